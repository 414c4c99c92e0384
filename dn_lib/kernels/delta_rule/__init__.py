"""The kernels of the delta rule and their launches."""
