"""From noise to latents: noise levels, samplers and the noise itself. numpy only, and nothing of ours but errors."""
