//! Checkpoints of `tests/checkpoints` with something wrong in them: nothing panics, and what is told names the file and what is wrong with it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor};
use efferent_tests::checkpoints::damaged;

fn edit(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{}: no {from}", path.display());
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

/// Damages a folder.
type Change<'a> = &'a dyn Fn(&Path);

#[test]
fn damaged_folders_say_what_is_wrong() {
    let cases: [(&str, Change<'_>, &str); 14] = [
        (
            "sd15",
            &|f| edit(&f.join("model_index.json"), "StableDiffusionPipeline", "OtherPipeline"),
            "_class_name is \"OtherPipeline\"",
        ),
        ("sd15", &|f| edit(&f.join("model_index.json"), "CLIPTextModel", "BertModel"), "text_encoder is a BertModel"),
        (
            "sd15",
            &|f| edit(&f.join("model_index.json"), "{", "{\"controlnet\": [\"diffusers\", \"ControlNetModel\"],"),
            "controlnet (ControlNetModel) is not known",
        ),
        (
            "sd15",
            &|f| std::fs::remove_file(f.join("unet/diffusion_pytorch_model.safetensors")).unwrap(),
            "no weights; looked for diffusion_pytorch_model.safetensors",
        ),
        (
            "sd15",
            &|f| edit(&f.join("scheduler/scheduler_config.json"), "{", "{\"use_beta_sigmas\": true,"),
            "use_beta_sigmas = true is not known",
        ),
        ("sd15", &|f| edit(&f.join("tokenizer/merges.txt"), "\n", "\nnopair\n"), "\"nopair\" is no pair"),
        (
            "sd15",
            &|f| edit(&f.join("tokenizer/vocab.json"), "<|endoftext|>", "<|end|>"),
            "\"<|endoftext|>\" is not in vocab.json",
        ),
        (
            "sd15",
            &|f| edit(&f.join("text_encoder/config.json"), "\"vocab_size\": 57", "\"vocab_size\": 3"),
            "tokenizer counts up to",
        ),
        (
            "sd21",
            &|f| {
                edit(
                    &f.join("vae/diffusion_pytorch_model.safetensors.index.json"),
                    "diffusion_pytorch_model-00001",
                    "../x/diffusion_pytorch_model-00001",
                )
            },
            "not a plain file name",
        ),
        (
            "sd21",
            &|f| std::fs::remove_file(f.join("unet/diffusion_pytorch_model-00003-of-00005.safetensors")).unwrap(),
            "cannot read",
        ),
        (
            "sdxl",
            &|f| {
                let path = f.join("unet/diffusion_pytorch_model.fp16.safetensors");
                let bytes = std::fs::read(&path).unwrap();
                std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
            },
            "truncated",
        ),
        (
            "flux-dev",
            &|f| edit(&f.join("transformer/config.json"), "{", "{\"pooled_twice\": true,"),
            "pooled_twice is not known",
        ),
        (
            "flux-schnell",
            &|f| edit(&f.join("transformer/config.json"), "\"in_channels\": 16", "\"in_channels\": 8"),
            "x_embedder.weight",
        ),
        (
            "z-image",
            &|f| edit(&f.join("transformer/config.json"), "\"cap_feat_dim\": 12", "\"cap_feat_dim\": 16"),
            "the encoders give z_image/12/qwen3@-2/none, the hand wants z_image/16/qwen3@-2/none",
        ),
    ];
    for (name, change, wanted) in cases {
        let told = damaged(name, change);
        assert!(told.contains(wanted), "{wanted}: {told}");
    }
}

/// Half of a file.
fn cut(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

/// Changes the tensors of a safetensors file.
fn change(path: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// Takes a tensor out of a file.
fn without(path: &Path, name: &str) {
    change(path, |tensors| drop(tensors.remove(name).unwrap()));
}

/// Makes a tensor of a file a vector of the same values.
fn flattened(path: &Path, name: &str) {
    change(path, |tensors| {
        let tensor = tensors.get_mut(name).unwrap();
        *tensor = tensor.flatten_all().unwrap();
    });
}

#[test]
fn damaged_weights_say_which_file_and_tensor() {
    let denoiser = "transformer/diffusion_pytorch_model.safetensors";
    let cases: [(&str, Change<'_>, &str); 13] = [
        (
            "sana",
            &|f| cut(&f.join("text_encoder/model.safetensors")),
            "text_encoder/model.safetensors: not a safetensors file, or a truncated one",
        ),
        ("sana", &|f| cut(&f.join(denoiser)), "model.safetensors: not a safetensors file, or a truncated one"),
        (
            "sana",
            &|f| without(&f.join(denoiser), "caption_norm.weight"),
            "model.safetensors: tensor caption_norm.weight [16] is missing",
        ),
        (
            "sana",
            &|f| flattened(&f.join("vae/diffusion_pytorch_model.safetensors"), "decoder.conv_in.weight"),
            "tensor decoder.conv_in.weight has shape [576], the model wants [16, 4, 3, 3]",
        ),
        (
            "sd3",
            &|f| cut(&f.join("text_encoder_3/model.safetensors")),
            "text_encoder_3/model.safetensors: not a safetensors file, or a truncated one",
        ),
        (
            "sd3",
            &|f| without(&f.join(denoiser), "pos_embed.pos_embed"),
            "model.safetensors: tensor pos_embed.pos_embed [1, 36, 16] is missing",
        ),
        (
            "sd3",
            &|f| flattened(&f.join(denoiser), "context_embedder.weight"),
            "tensor context_embedder.weight has shape [448], the model wants [16, 28]",
        ),
        (
            "metaquery",
            &|f| cut(&f.join("connector.safetensors")),
            "connector.safetensors: not a safetensors file, or a truncated one",
        ),
        (
            "metaquery",
            &|f| without(&f.join("connector.safetensors"), "model.connector.4.weight"),
            "connector.safetensors: tensor connector.4.weight [12] is missing",
        ),
        (
            "metaquery",
            &|f| {
                let name = "model.connector.0.layers.1.self_attn.q_norm.gamma";
                flattened(&f.join("connector.safetensors"), name);
            },
            "tensor connector.0.layers.1.self_attn.q_norm.gamma has shape [16], the model wants [2, 1, 8]",
        ),
        ("openuni", &|f| cut(&f.join("connector.pth")), "connector.pth: not a file of torch.save, or a truncated one"),
        // As good as files without a layer, and with one query less.
        (
            "openuni",
            &|f| edit(&f.join("pipeline.json"), "\"layers\": 2", "\"layers\": 3"),
            "tensor connector.layers.2.self_attn.q_proj.weight [16, 16] is missing",
        ),
        (
            "openuni",
            &|f| edit(&f.join("pipeline.json"), "\"queries\": 5", "\"queries\": 6"),
            "tensor meta_queries has shape [5, 16], the model wants [6, 16]",
        ),
    ];
    for (name, change, wanted) in cases {
        let told = damaged(name, change);
        assert!(told.contains(wanted), "{name}: {wanted}: {told}");
    }
}
