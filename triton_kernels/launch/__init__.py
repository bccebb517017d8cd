"""What every kernel needs: cached launches, TMA descriptors, shared memory, names that move between
releases of Triton, SMs shared with communication."""
