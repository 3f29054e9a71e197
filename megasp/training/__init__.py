"""From configuration to trained weights: build, the step, the loop, optimizer, schedules, evaluation, metrics."""
