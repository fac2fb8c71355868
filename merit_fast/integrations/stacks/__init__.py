"""One callback for stacks that show no batches: axolotl, LLaMA-Factory and ms-swift."""
