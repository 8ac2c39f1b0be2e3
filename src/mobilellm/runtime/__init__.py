"""Running a .gguf file on a CPU, without torch."""
