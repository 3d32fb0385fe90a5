"""Other libraries' Python interfaces over our kernels, for code that is written for those libraries."""
