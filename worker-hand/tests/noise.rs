//! Noise equals `torch.randn` on CPU. `noise/reference.py` makes the values.
//!
//! Tolerance: 2e-6 for each value: PyTorch's vectorised log, sin and cos differ from libm's by as much.

use efferent_hand::noise::randn;
use serde_json::Value;

#[test]
fn noise_equals_torch() {
    let rows: Vec<Value> = serde_json::from_str(include_str!("noise/randn.json")).unwrap();
    assert!(rows.len() >= 40);
    for row in rows {
        let seed: u64 = row["seed"].as_str().unwrap().parse().unwrap();
        let count: u64 = row["shape"].as_array().unwrap().iter().map(|side| side.as_u64().unwrap()).product();
        let values = randn(seed, count as usize);
        assert_eq!(values.len() as u64, count);
        for (index, wanted) in row["index"].as_array().unwrap().iter().zip(row["values"].as_array().unwrap()) {
            let (got, wanted) = (f64::from(values[index.as_u64().unwrap() as usize]), wanted.as_f64().unwrap());
            assert!((got - wanted).abs() < 2e-6, "seed {seed}, {count} values, at {index}: {got} is not {wanted}");
        }
        let sum: f64 = values.iter().map(|value| f64::from(*value)).sum();
        assert!((sum - row["sum"].as_f64().unwrap()).abs() < 1e-6 * count as f64 + 1e-6, "sum of {count} for {seed}");
    }
}
