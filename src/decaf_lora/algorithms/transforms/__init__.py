"""What lies over a rule, whichever it is: one file a transform, its formula on top."""
