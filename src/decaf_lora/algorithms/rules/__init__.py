"""The rules: one file each, its formula on top. `decaf_lora.algorithms` hands their functions on."""
