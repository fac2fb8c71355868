"""LoRA adapters as PEFT writes them: config, keys, and the changes that they make to a base.

``config`` reads adapter_config.json, ``keys`` the names in the weights' file; ``adapter`` joins
them; ``modules`` and ``experts`` make changes of a base's tensors; ``tied`` keeps heads right;
``on_base`` puts it all together.
"""
