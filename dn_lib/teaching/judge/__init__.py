"""The judge of kernels that a learner writes."""
