//! The `efferent` command (to come).

fn main() {}
