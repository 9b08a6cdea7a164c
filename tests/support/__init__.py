"""GPU code on machines without a GPU: run it on the CPU, and compile it for chips that are not there."""
