"""Set-up that every test shares."""

import jax

# Eight virtual devices: mesh tests need them, and other tests run on the first.
jax.config.update("jax_num_cpu_devices", 8)
