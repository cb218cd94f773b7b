"""qadapt fine-tunes 7B-class language models on the GPU you already own."""
