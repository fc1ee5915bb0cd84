"""From activations to a trained SAE: trainer, losses, schedules, callbacks, runs."""
