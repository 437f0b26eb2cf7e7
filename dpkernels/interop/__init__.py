"""Rules for layers of other libraries. `dpkernels.swap` loads the rules of libraries that are imported already."""
