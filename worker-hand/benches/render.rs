//! Rendering speed (to come).

fn main() {}
