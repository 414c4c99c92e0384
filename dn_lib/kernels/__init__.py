"""Chapter 5: the Triton kernels.  README.md in this folder describes them."""
