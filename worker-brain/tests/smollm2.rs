//! SmolLM2 from its real weights agrees with transformers. `smollm2/reference.py` makes the files.
//!
//! The weights are those that `efferent models fetch` keeps below `EFFERENT_HOME`.

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use efferent_brain::families::{
    Source,
    smollm2::{self, language::Language, tokens::Tokens},
};
use efferent_proto::v1::ErrorCode;
use efferent_worker::{
    engine::{EmbedRequest, EngineError},
    pipeline::Pipeline,
    testing::check_brain,
    weights::{Dtypes, Gguf, Keep},
};
use serde_json::Value;

fn weights() -> PathBuf {
    let home = std::env::var_os("EFFERENT_HOME").map(PathBuf::from);
    let cache = || Some(PathBuf::from(std::env::var_os("XDG_CACHE_HOME")?).join("efferent"));
    let usual = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/efferent"));
    let home = home.or_else(cache).or_else(usual).expect("a home folder");
    let path = home.join("brains/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.is_file(), "{} is missing; `efferent models fetch` gets it", path.display());
    path
}

#[test]
fn token_ids_are_those_of_transformers() {
    let tokens = Tokens::read(&Gguf::open(&weights()).unwrap()).unwrap();
    let rows: Vec<Value> = serde_json::from_str(include_str!("smollm2/tokens.json")).unwrap();
    assert!(rows.len() >= 20);
    for row in rows {
        let wanted: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
        assert_eq!(tokens.encode(row["text"].as_str().unwrap()).unwrap(), wanted, "{}", row["text"]);
    }
}

/// Tolerance: 1e-3 of the largest value of a state, alone and in a padded batch.
#[test]
fn hidden_states_are_those_of_transformers() {
    const LAYER: usize = 24;
    const WIDTH: usize = 576;
    let language = Language::read(&Gguf::open(&weights()).unwrap(), LAYER, &[Device::Cpu], Keep::F32).unwrap();
    let golden = candle_core::safetensors::load(
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/smollm2/states.safetensors"),
        &Device::Cpu,
    )
    .unwrap();
    let rows: Vec<Vec<u32>> =
        (0..4).map(|i| golden[&format!("{i}.ids")].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap()).collect();
    let check = |rows: &[Vec<u32>], first: usize| {
        let longest = rows.iter().map(Vec::len).max().unwrap();
        let padded: Vec<u32> = rows.iter().flat_map(|r| (0..longest).map(|i| r.get(i).copied().unwrap_or(0))).collect();
        let mask: Vec<f32> = rows.iter().flat_map(|r| (0..longest).map(|i| f32::from(u8::from(i < r.len())))).collect();
        let tensor = |count| (count, longest);
        let ids = Tensor::from_vec(padded, tensor(rows.len()), &Device::Cpu).unwrap();
        let mask = Tensor::from_vec(mask, tensor(rows.len()), &Device::Cpu).unwrap();
        let states = language.states(&ids, &mask).unwrap();
        for (index, row) in rows.iter().enumerate() {
            let wanted = golden[&format!("{}.states", first + index)].to_vec2::<f32>().unwrap();
            for (place, wanted) in [0, row.len() / 2, row.len() - 1].into_iter().zip(wanted) {
                let got = states.get(index).unwrap().get(place).unwrap().to_vec1::<f32>().unwrap();
                assert_eq!((got.len(), wanted.len()), (WIDTH, WIDTH));
                let largest = wanted.iter().fold(0f32, |a, b| a.max(b.abs()));
                let error = got.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max) / largest;
                assert!(error < 1e-3, "prompt {}, position {place}: {error}", first + index);
            }
        }
    };
    check(&rows, 0);
    for (index, row) in rows.iter().enumerate() {
        check(std::slice::from_ref(row), index);
    }
}

/// The shipped brain and connector keep the engine contract: a batch equals its singles, what is refused is refused alone.
#[test]
fn the_contract_holds() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/pictogram");
    let source = Source {
        pipeline: Pipeline::open(&folder).unwrap(),
        weights: Some(weights()),
        devices: vec![Device::Cpu],
        dtypes: Dtypes::default(),
    };
    let mut brain = smollm2::load(&source).unwrap();
    let request = |prompt: &str| EmbedRequest { prompt: prompt.to_owned(), ..Default::default() };
    let prompts = [
        "a",
        "two penguins in the snow",
        "\u{1f34e} \u{4e00}\u{53ea}\u{732b}, na\u{ef}ve <|im_end|>\n 42",
        "\0\u{202e}x",
    ];
    let refused = request(&"word ".repeat(100));
    check_brain(brain.as_mut(), &prompts.map(request), &refused);
    match brain.tokens(&refused) {
        Err(EngineError::Refused(error)) => {
            assert_eq!((error.code, error.field.as_str()), (ErrorCode::LimitExceeded, "prompt"));
            assert!(!error.limit.is_empty());
        }
        other => panic!("{other:?}"),
    }
}
