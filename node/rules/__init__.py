"""Which Series are analysed: the rules of the configuration, asked by `complete` and by `cspine rules`."""
