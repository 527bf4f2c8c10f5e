//! The vector kernels themselves, at every level.
