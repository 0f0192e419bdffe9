"""The facts of computers that are not here, from what their own files and tools print."""

from __future__ import annotations

import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_sd.machine import (
    Machine,
    apple_chip,
    linux_machine,
    mac_machine,
    parse_charge,
    parse_cpu_quota,
    parse_cpuinfo,
    parse_meminfo,
    parse_memory_limit,
    parse_pmset,
    parse_pmset_charge,
    parse_supplies,
    parse_sysctl,
    parse_vm_stat,
    this_machine,
)

GB = 1 << 30
XEON = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Processor @ 2.10GHz
flags\t\t: fpu sse2 avx avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
bugs\t\t: spectre_v1

processor\t: 1
model name\t: Intel(R) Xeon(R) Processor @ 2.10GHz
flags\t\t: fpu sse2 avx avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
"""
RASPBERRY = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41

Hardware\t: BCM2835
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
MEMINFO = """MemTotal:        8117360 kB
MemFree:          512000 kB
MemAvailable:    6012345 kB
Buffers:           10000 kB
"""
SYSCTL = """machdep.cpu.brand_string: Apple M2 Pro
hw.memsize: 17179869184
hw.ncpu: 10
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_I8MM: 0
"""
INTEL_MAC = """machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz
hw.memsize: 17179869184
hw.ncpu: 12
machdep.cpu.leaf7_features: RDWRFSGS TSC_THREAD_OFFSET BMI1 AVX2 SMEP BMI2
"""
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages wired down:                        100000.
Pages purgeable:                            400.
"Translation faults":                 123456789.
"""
PMSET = "Now drawing from '{}'\n -InternalBattery-0 (id=1234567)\t97%; discharging; 5:12 remaining present: true\n"


def test_processors_of_linux() -> None:
    name, flags = parse_cpuinfo(XEON)
    assert name == "Intel(R) Xeon(R) Processor @ 2.10GHz"
    assert flags == {"AVX2", "AVX512", "VNNI", "BF16", "AMX-BF16", "AMX-INT8"}
    name, flags = parse_cpuinfo(RASPBERRY)
    assert name == "Raspberry Pi 5 Model B Rev 1.0"
    assert flags == {"NEON", "FP16", "DOTPROD"}
    assert parse_cpuinfo("") == ("", frozenset())


def test_memory_of_linux() -> None:
    assert parse_meminfo(MEMINFO) == (8117360 << 10, 6012345 << 10)
    assert parse_meminfo("MemTotal: 4 kB\nMemFree: 2 kB\n") == (4096, 2048), "before Linux 3.14"
    assert parse_meminfo("") == (0, 0)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "100000 0\n"}, None),
        ({"cpu.max": "junk"}, None),
        ({}, None),
    ],
)
def test_cores_of_a_container(files: dict[str, str], cores: float | None) -> None:
    assert parse_cpu_quota(files) == cores


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({"memory.max": f"{2 * GB}\n", "memory.current": f"{GB}\n"}, (2 * GB, GB)),
        ({"memory.max": f"{2 * GB}", "memory.current": f"{GB}", "memory.stat": f"anon 5\ninactive_file {GB // 2}\n"},
         (2 * GB, 3 * GB // 2)),
        ({"memory.max": "max\n"}, None),
        ({"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": "5"}, None),
        ({"memory.limit_in_bytes": f"{GB}", "memory.usage_in_bytes": f"{2 * GB}"}, (GB, 0)),
        ({}, None),
    ],
)  # fmt: skip
def test_memory_of_a_container(files: dict[str, str], limits: tuple[int, int] | None) -> None:
    assert parse_memory_limit(files) == limits


@pytest.mark.parametrize(
    ("supplies", "on_battery"),
    [
        ({"AC": {"type": "Mains\n", "online": "1\n"}, "BAT0": {"type": "Battery", "status": "Charging"}}, False),
        ({"AC": {"type": "Mains", "online": "0"}, "BAT0": {"type": "Battery\n", "status": "Discharging\n"}}, True),
        ({"mouse": {"type": "Battery", "scope": "Device", "status": "Discharging"}}, None),
        ({"AC": {"type": "Mains", "online": "1"}, "mouse": {"type": "Battery", "scope": "Device"}}, False),
        ({"usb": {"type": "USB", "online": "1"}, "BAT1": {"type": "Battery", "status": "Full"}}, False),
        ({}, None),
    ],
)
def test_power_of_linux(supplies: dict[str, dict[str, str]], on_battery: bool | None) -> None:
    assert parse_supplies(supplies) is on_battery


def test_the_charge_is_that_of_the_computers_fullest_battery() -> None:
    mouse = {"type": "Battery", "scope": "Device", "capacity": "99"}
    laptop = {"type": "Battery\n", "capacity": "41\n"}
    assert parse_charge({"BAT0": laptop, "BAT1": {**laptop, "capacity": "87"}, "hid": mouse}) == 87
    assert parse_charge({"BAT0": {"type": "Battery"}, "hid": mouse}) is None
    row = " -InternalBattery-0 (id=4522083)\t{}%; discharging; 3:24 remaining present: true\n"
    assert parse_pmset_charge("Now drawing from 'Battery Power'\n" + row.format(64)) == 64
    assert parse_pmset_charge("Now drawing from 'AC Power'\n") is None


def test_a_container_on_linux() -> None:
    files = {"/proc/cpuinfo": XEON, "/proc/meminfo": MEMINFO, "/sys/fs/cgroup/cpu.max": "100000 100000",
             "/sys/fs/cgroup/memory.max": f"{GB}", "/sys/fs/cgroup/memory.current": f"{GB // 4}"}  # fmt: skip
    machine = linux_machine(lambda path: files.get(path, ""), {}, cores=64)
    assert (machine.cores, machine.memory, machine.free) == (1, GB, 3 * GB // 4)
    assert "AMX-BF16" in machine.flags
    assert "1 core," in machine.describe()
    assert "power not known" in machine.describe()


def test_a_linux_that_tells_nothing() -> None:
    machine = linux_machine(lambda path: "", {}, cores=0)
    assert (machine.cores, machine.memory, machine.free, machine.on_battery) == (1, 0, 0, None)
    assert "CPU not known" in machine.describe()


def test_macs() -> None:
    machine = mac_machine(SYSCTL, VM_STAT, PMSET.format("Battery Power"), "14.5", "arm64")
    assert (machine.apple_chip, machine.apple_generation, machine.os_version) == ("M2 Pro", 2, (14, 5))
    assert (machine.cores, machine.memory, machine.on_battery) == (10, 16 * GB, True)
    assert machine.free == 33400 * 16384
    assert machine.flags == {"NEON", "FP16", "BF16"}
    assert "Apple M2 Pro" in machine.describe()
    assert "macOS 14.5" in machine.describe()
    intel = mac_machine(INTEL_MAC, VM_STAT, PMSET.format("AC Power"), "13.6.1", "x86_64")
    assert (intel.apple_chip, intel.apple_generation, intel.on_battery) == ("", 0, False)
    assert intel.flags == {"AVX2"}
    assert mac_machine("", "", "", "", "").cores == 1


@pytest.mark.parametrize(
    ("brand", "chip"),
    [("Apple M1", "M1"), ("Apple M3 Max", "M3 Max"), ("Apple M12 Ultra", "M12 Ultra"), ("Apple M4 (Virtual)", "M4"),
     ("Intel(R) Core(TM) i9", ""), ("VirtualApple @ 2.50GHz", ""), ("", "")],
)  # fmt: skip
def test_apple_chips(brand: str, chip: str) -> None:
    assert apple_chip(brand) == chip


ANY = st.text(st.characters(codec="utf-8"), max_size=300)


# A digit for str.isdigit and no number for int.
@example("²", {"cpu.max": "² 1", "memory.max": "²", "memory.current": "²"})
@given(ANY, st.dictionaries(st.sampled_from(["cpu.max", "memory.max", "memory.current", "memory.stat"]), ANY))
def test_no_text_stops_a_reader(text: str, files: dict[str, str]) -> None:
    """Kernels, containers and translations print what they like; a fact is then not known."""
    parse_cpuinfo(text)
    assert all(size >= 0 for size in parse_meminfo(text))
    parse_cpu_quota(files)
    limits = parse_memory_limit(files)
    assert limits is None or 0 <= limits[1] <= max(limits)
    parse_supplies({"a": {"type": text, "status": text}})
    parse_charge({"a": {"type": "Battery", "capacity": text}})
    parse_pmset_charge(text)
    parse_sysctl(text)
    assert parse_vm_stat(text) >= 0
    parse_pmset(text)
    apple_chip(text)
    assert mac_machine(text, text, text, text, text).cores >= 1
    assert linux_machine(lambda path: text, {}, 4).cores >= 1
    Machine(version=text).describe()


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    if sys.platform == "linux":
        assert 0 < machine.free <= machine.memory
        assert machine.system == "Linux"
