"""From a prompt to what a denoiser attends to."""
