"""The judge of what a learner writes: limits, numbers and how they differ, the method, and kernels."""
