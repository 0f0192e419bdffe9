"""Machine: the facts about this computer that decide what runs well on it.

Each reader turns one recorded text (/proc/cpuinfo, a cgroup's file, sysctl's or pmset's output) into facts, so tests
feed them the texts of machines that are not here. Only `this_machine` looks around; what it can't find out is left
at "not known" and nothing is raised.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that change how fast a network runs or in which precision; Linux' names for them.
KNOWN_FLAGS = {
    "avx2": "AVX2", "avx512f": "AVX512", "avx512_vnni": "VNNI", "avx_vnni": "AVX-VNNI", "avx512_bf16": "BF16",
    "amx_bf16": "AMX-BF16", "amx_int8": "AMX-INT8", "amx_fp16": "AMX-FP16", "asimd": "NEON", "asimdhp": "FP16",
    "asimddp": "DOTPROD", "bf16": "BF16", "sve": "SVE", "i8mm": "I8MM",
}  # fmt: skip
# A cgroup says "no limit" by a number near 2^63.
NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Machine:
    """What is known of a computer; 0, "" and None are "not known".

    system      "Linux", "Darwin" or "Windows"; `version` of it, such as "14.5" for macOS
    arch        "x86_64", "arm64", …
    flags       instruction sets, by the names on the right of KNOWN_FLAGS
    cores       that this process may use, container limits included (at least 1)
    memory      bytes of RAM, or the container's limit; `free` is what can be had now without swapping
    on_battery  True, False, or None where there is no telling
    charge      of the battery, in percent; None where there is none, or no telling
    apple_chip  "M1", "M2 Pro", … or ""
    """

    system: str = ""
    version: str = ""
    arch: str = ""
    cpu: str = ""
    flags: frozenset[str] = frozenset()
    cores: int = 1
    memory: int = 0
    free: int = 0
    on_battery: bool | None = None
    apple_chip: str = ""
    charge: int | None = None

    @property
    def os_version(self) -> tuple[int, ...]:
        """The numbers of `version`: (14, 5); () where it is not known."""
        return tuple(int(n) for n in re.findall(r"\d+", self.version)[:3])

    @property
    def apple_generation(self) -> int:
        """4 for every kind of M4; 0 where there is no Apple chip."""
        match = re.match(r"M(\d+)", self.apple_chip)
        return int(match[1]) if match else 0

    def describe(self) -> str:
        """One line for people."""
        memory = f"{self.memory / 2**30:.1f} GB" if self.memory else "memory not known"
        free = f" ({self.free / 2**30:.1f} GB free)" if self.free else ""
        power = {True: "on battery", False: "on mains", None: "power not known"}[self.on_battery]
        chip = f"Apple {self.apple_chip}" if self.apple_chip else self.cpu or "CPU not known"
        system = "macOS" if self.system == "Darwin" else self.system
        cores = f"{self.cores} core{'s' * (self.cores != 1)}"
        parts = [chip, cores, " ".join(sorted(self.flags)), memory + free, power]
        parts.append(f"{system} {self.version} {self.arch}".strip())
        return ", ".join(part for part in parts if part)


def parse_cpuinfo(text: str) -> tuple[str, frozenset[str]]:
    """The CPU's name and known flags of Linux' /proc/cpuinfo (x86: "flags", Arm: "Features")."""
    rows = dict(re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE)[::-1])
    words = set(str(rows.get("flags", rows.get("Features", ""))).split())
    name = rows.get("model name") or rows.get("Model") or rows.get("Hardware") or ""
    return str(name).strip(), frozenset(ours for theirs, ours in KNOWN_FLAGS.items() if theirs in words)


def parse_meminfo(text: str) -> tuple[int, int]:
    """Bytes in all and available, of Linux' /proc/meminfo; 0 where a line is missing."""
    rows = {key: int(kilobytes) << 10 for key, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return rows.get("MemTotal", 0), rows.get("MemAvailable", rows.get("MemFree", 0))


def parse_cpu_quota(files: Mapping[str, str]) -> float | None:
    """Cores that a container may use, of its cgroup's files (version 2 or 1) by name; None without a limit."""
    if words := files.get("cpu.max", "").split():
        quota, period = words[0], words[1] if len(words) > 1 else "100000"
    else:
        quota, period = files.get("cpu.cfs_quota_us", "").strip(), files.get("cpu.cfs_period_us", "").strip()
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def parse_memory_limit(files: Mapping[str, str]) -> tuple[int, int] | None:
    """A container's limit in bytes and what is left of it, page cache that can be dropped included; None without."""
    limit = files.get("memory.max", files.get("memory.limit_in_bytes", "")).strip()
    used = files.get("memory.current", files.get("memory.usage_in_bytes", "")).strip()
    if not limit.isdecimal() or int(limit) >= NO_LIMIT:
        return None
    cache = re.search(r"^(?:total_)?inactive_file (\d+)$", files.get("memory.stat", ""), re.MULTILINE)
    taken = (int(used) if used.isdecimal() else 0) - (int(cache[1]) if cache else 0)
    return int(limit), max(0, int(limit) - max(0, taken))


def parse_supplies(supplies: Mapping[str, Mapping[str, str]]) -> bool | None:
    """Whether Linux runs on battery, from /sys/class/power_supply (files by supply). None without a battery."""
    mains = [s for s in supplies.values() if s.get("type", "").strip() in ("Mains", "USB")]
    if any(s.get("online", "").strip() == "1" for s in mains):
        return False
    batteries = _batteries(supplies)
    if any(s.get("status", "").strip() == "Discharging" for s in batteries):
        return True
    return False if mains or batteries else None


def parse_charge(supplies: Mapping[str, Mapping[str, str]]) -> int | None:
    """The charge of the fullest battery in percent, from /sys/class/power_supply; None without one."""
    charges = [s.get("capacity", "").strip() for s in _batteries(supplies)]
    return max((int(charge) for charge in charges if charge.isdecimal()), default=None)


def _batteries(supplies: Mapping[str, Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The batteries of the computer itself: a mouse or a headset has one of its own, with scope "Device"."""
    return [
        s
        for s in supplies.values()
        if s.get("type", "").strip() == "Battery" and s.get("scope", "").strip() != "Device"
    ]


def parse_sysctl(text: str) -> dict[str, str]:
    """The rows `name: value` that macOS' sysctl prints."""
    return dict(re.findall(r"^([\w.]+): (.*)$", text, re.MULTILINE))


def parse_vm_stat(text: str) -> int:
    """Bytes that macOS can give without swapping: free, inactive, speculative and purgeable pages of vm_stat."""
    page = re.search(r"page size of (\d+) bytes", text)
    names = "free|inactive|speculative|purgeable"
    pages = sum(int(n) for n in re.findall(rf"^Pages (?:{names}):\s+(\d+)", text, re.MULTILINE))
    return pages * (int(page[1]) if page else 4096)


def parse_pmset(text: str) -> bool | None:
    """Whether a Mac runs on battery, of `pmset -g batt`."""
    source = re.search(r"drawing from '(\w+)", text)
    return None if source is None else source[1] == "Battery"


def parse_pmset_charge(text: str) -> int | None:
    """The charge of a Mac's battery in percent, of `pmset -g batt`."""
    charge = re.search(r"\t(\d{1,3})%;", text)
    return None if charge is None else int(charge[1])


def apple_chip(brand: str) -> str:
    """ "M2 Pro" of "Apple M2 Pro"; "" for another maker's."""
    match = re.match(r"(?:Apple )(M\d+(?: (?:Pro|Max|Ultra))?)\b", brand)
    return match[1] if match else ""


def linux_machine(read: Callable[[str], str], supplies: Mapping[str, Mapping[str, str]], cores: int) -> Machine:
    """A Linux machine; `read` gives a file's text or "", `cores` are those of the process' affinity."""
    name, flags = parse_cpuinfo(read("/proc/cpuinfo"))
    memory, free = parse_meminfo(read("/proc/meminfo"))
    files = {}
    for folder in ("", "cpu/", "memory/"):
        for file in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us", "memory.max", "memory.current",
                     "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"):  # fmt: skip
            if text := read(f"/sys/fs/cgroup/{folder}{file}"):
                files[file] = text
    quota = parse_cpu_quota(files)
    if quota is not None:
        cores = min(cores, max(1, round(quota)))
    if limits := parse_memory_limit(files):
        memory, free = min(memory or limits[0], limits[0]), min(free or limits[1], limits[1])
    return Machine("Linux", platform.release(), platform.machine(), name, flags, max(1, cores), memory, free,
                   parse_supplies(supplies), charge=parse_charge(supplies))  # fmt: skip


def mac_machine(sysctl: str, vm_stat: str, pmset: str, version: str, arch: str) -> Machine:
    """A Mac, of what its own tools print."""
    rows = parse_sysctl(sysctl)
    brand = rows.get("machdep.cpu.brand_string", "")
    features = set(rows.get("machdep.cpu.leaf7_features", "").split())
    flags = {"AVX2": "AVX2" in features, "AVX512": "AVX512F" in features, "NEON": arch == "arm64",
             "FP16": rows.get("hw.optional.arm.FEAT_FP16") == "1", "BF16": rows.get("hw.optional.arm.FEAT_BF16") == "1",
             "I8MM": rows.get("hw.optional.arm.FEAT_I8MM") == "1"}  # fmt: skip
    number = {
        name: int(rows.get(name, "0")) if rows.get(name, "0").isdecimal() else 0 for name in ("hw.memsize", "hw.ncpu")
    }
    return Machine("Darwin", version, arch, brand, frozenset(name for name, there in flags.items() if there),
                   max(1, number["hw.ncpu"]), number["hw.memsize"], parse_vm_stat(vm_stat), parse_pmset(pmset),
                   apple_chip(brand), parse_pmset_charge(pmset))  # fmt: skip


def this_machine() -> Machine:
    """The facts of the computer this runs on; a fact that can't be read is "not known"."""
    if sys.platform == "darwin":
        sysctl = _output("sysctl", "machdep.cpu.brand_string", "hw.memsize", "hw.ncpu", "hw.optional.arm",
                         "machdep.cpu.leaf7_features")  # fmt: skip
        pmset = _output("pmset", "-g", "batt")
        return mac_machine(sysctl, _output("vm_stat"), pmset, platform.mac_ver()[0], platform.machine())
    if sys.platform == "win32":
        return _windows_machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return linux_machine(_read, _read_supplies(), cores)


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


def _read_supplies() -> dict[str, dict[str, str]]:
    try:
        folders = sorted(Path("/sys/class/power_supply").iterdir())
    except OSError:
        return {}
    names = ("type", "online", "status", "scope", "capacity")
    return {folder.name: {name: _read(str(folder / name)) for name in names} for folder in folders}


def _output(*command: str) -> str:
    import subprocess

    try:
        # sysctl prints what it knows and fails for the rest.
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _windows_machine() -> Machine:
    """By kernel32, without any package. Written against Microsoft's documentation; it has not run on Windows."""
    import ctypes

    kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009 - mypy on other systems knows no windll
    flags = {"AVX2": 40, "AVX512": 41, "NEON": 19}

    class MemoryStatus(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong),
                    *((name, ctypes.c_ulonglong) for name in ("total", "free", "a", "b", "c", "d", "e"))]  # fmt: skip

    class PowerStatus(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ubyte) for name in ("mains", "battery", "percent", "saver")] + [
            ("life", ctypes.c_ulong), ("full", ctypes.c_ulong)]  # fmt: skip

    memory, power = MemoryStatus(), PowerStatus()
    memory.length = ctypes.sizeof(memory)
    known = kernel32.GlobalMemoryStatusEx(ctypes.byref(memory))
    told = kernel32.GetSystemPowerStatus(ctypes.byref(power))
    return Machine(
        "Windows", platform.version(), platform.machine(), platform.processor(),
        frozenset(name for name, n in flags.items() if kernel32.IsProcessorFeaturePresent(n)), os.cpu_count() or 1,
        int(memory.total) if known else 0, int(memory.free) if known else 0,
        {0: True, 1: False}.get(int(power.mains)) if told else None,
        charge=int(power.percent) if told and power.percent <= 100 else None,
    )  # fmt: skip
