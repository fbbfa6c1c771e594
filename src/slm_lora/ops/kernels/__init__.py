"""C++ for CPUs with AVX512-BF16 or AMX, compiled on first use."""
