"""The transforms, options that lie over any rule: one file each, its formula on top."""
