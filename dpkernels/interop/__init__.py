"""Rules for layers of other libraries. `dpkernels.swap` loads those whose library is already imported."""
