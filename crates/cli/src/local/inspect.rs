//! `efferent models inspect`: what a model is made of, before anything is loaded.

use std::collections::BTreeSet;

use efferent_worker::{
    memory,
    pipeline::Pipeline,
    signal::space_name,
    weights::{self, Dtypes, Gguf, Keep, Measure},
};
use serde_json::json;

use crate::{
    exit::{Exit, Failure},
    local::engines,
    output,
    settings::Settings,
};

/// Prints a model's parts, their weights and the memory that they take.
///
/// # Errors
/// If the model is not found or malformed, or a file of it cannot be read.
pub(crate) fn inspect(settings: &Settings, name: Option<&str>, as_json: bool) -> Result<(), Failure> {
    let pipeline = engines::open(name.unwrap_or(&settings.client.model), &settings.local.models)?;
    let parts = parts(&pipeline, settings, &dtypes(settings, &[&pipeline])?)?;
    let unknown = || "not declared".to_owned();
    let space = pipeline.declared_space();
    let model = space.as_ref().map(|space| pipeline.model(space));
    let needed = |role: &[&str]| -> Option<u64> {
        parts.iter().filter(|part| role.contains(&part.role)).map(Part::memory).sum()
    };
    let memory = [("brain", needed(&["brain", "connector"])), ("hand", needed(&["hand"]))];
    if as_json {
        let shown = |part: &Part| {
            let measure = part.measure.as_ref();
            json!({
                "role": part.role,
                "name": part.name,
                "kind": part.kind,
                "types": measure.map(|measure| measure.types.clone()),
                "parameters": measure.map(|measure| measure.parameters),
                "bytes": measure.map(|measure| measure.bytes),
                "memory_bytes": part.memory(),
            })
        };
        return output::line(json!({
            "name": pipeline.name(),
            "folder": pipeline.folder().display().to_string(),
            "description": pipeline.description(),
            "space": space.as_ref().map(space_name),
            "parts": parts.iter().map(shown).collect::<Vec<_>>(),
            "memory_bytes": memory.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "memory_available_bytes": memory::available(),
            "model": model.as_ref().map(crate::client::json::model),
        }));
    }
    let mut rows = vec![["ROLE", "PART", "KIND", "TYPE", "PARAMETERS", "FILES", "MEMORY"].map(str::to_owned).to_vec()];
    for part in &parts {
        let mut row = vec![part.role.to_owned(), part.name.clone(), part.kind.clone()];
        row.extend(match &part.measure {
            Some(measure) => [
                measure.types.iter().cloned().collect::<Vec<_>>().join("+"),
                scaled(measure.parameters, ""),
                scaled(measure.bytes, "B"),
                scaled(measure.memory(part.keep), "B"),
            ],
            None => ["to be fetched", "-", "-", "-"].map(str::to_owned),
        });
        rows.push(row);
    }
    let needs = memory.iter().map(|(role, bytes)| {
        let bytes = bytes.map_or_else(|| "unknown".to_owned(), |bytes| scaled(bytes, "B"));
        format!("{role} {bytes}")
    });
    let free =
        memory::available().map_or_else(String::new, |bytes| format!(" ({} can be had here)", scaled(bytes, "B")));
    output::line(format_args!(
        "{}: {}\n{}\n\n{}\n\nfamilies: {} (brain), {} (hand)\nspace of the control signal: {}\nmemory for the weights, by worker: {}{free}",
        pipeline.name(),
        pipeline.description(),
        pipeline.folder().display(),
        output::table(&rows),
        pipeline.brain().family,
        pipeline.hand().family,
        space.as_ref().map_or_else(unknown, space_name),
        needs.collect::<Vec<_>>().join(", "),
    ))?;
    let Some(model) = model else { return Ok(()) };
    let sizes: Vec<String> = model.sizes.iter().map(|size| format!("{}x{}", size.width, size.height)).collect();
    let range = model.size_range.map_or_else(String::new, |range| {
        format!("; any of sides {} to {} that are multiples of {}", range.min_side, range.max_side, range.multiple)
    });
    output::line(format_args!(
        "sizes: {}{range}\nsamplers: {}\nsteps: {} (up to {}), guidance: {} (up to {}), prompt: up to {} tokens, negative prompt: {}, image to image: {}, inpainting: {}, guidance rescale: {}, guidance range: {}, reference images: {}",
        sizes.join(", "),
        model.samplers.join(", "),
        model.default_steps,
        model.max_steps,
        model.default_guidance_scale,
        model.max_guidance_scale,
        model.max_prompt_tokens,
        yes(model.negative_prompt),
        yes(model.image_to_image),
        if model.inpainting_only { "yes, and nothing else" } else { yes(model.inpainting) },
        yes(model.guidance_rescale),
        yes(model.guidance_range),
        model.max_reference_images,
    ))
}

fn yes(offered: bool) -> &'static str {
    if offered { "yes" } else { "no" }
}

/// A part of a model.
pub(crate) struct Part {
    /// `brain`, `connector` or `hand`.
    pub(crate) role: &'static str,
    name: String,
    kind: String,
    /// None if the weights are to be fetched first.
    measure: Option<Measure>,
    keep: Keep,
}

impl Part {
    /// Bytes that its weights take in memory, unless they are to be fetched first.
    pub(crate) fn memory(&self) -> Option<u64> {
        self.measure.as_ref().map(|measure| measure.memory(self.keep))
    }
}

/// What the parts of models are kept as.
///
/// # Errors
/// If that is malformed, or names a part that none of them has.
pub(crate) fn dtypes(settings: &Settings, models: &[&Pipeline]) -> Result<Dtypes, Failure> {
    let refused = |what: String| Failure::words(Exit::Config, format!("dtype: {what}"));
    let dtypes: Dtypes = settings.local.dtype.parse().map_err(refused)?;
    let mut known = BTreeSet::new();
    for pipeline in models {
        let stored = pipeline.stored().map_err(|error| Failure::new(Exit::Config, error))?;
        known.extend(stored.into_iter().map(|part| part.name));
        known.extend(pipeline.brain().fetched.as_ref().map(|_| pipeline.brain().name.clone()));
    }
    if let Some(part) = dtypes.named().find(|part| !known.contains(*part)) {
        let known = Vec::from_iter(known).join(", ");
        return Err(refused(format!("no part is called {part:?}; there are {known}")));
    }
    Ok(dtypes)
}

/// What a model is made of.
///
/// # Errors
/// If a file of it cannot be read.
pub(crate) fn parts(pipeline: &Pipeline, settings: &Settings, dtypes: &Dtypes) -> Result<Vec<Part>, Failure> {
    let mut found = Vec::new();
    if let Some(file) = pipeline.brain_weights(&settings.local.home) {
        let measure = match file.exists() {
            true => Some(Gguf::open(&file).map_err(|error| Failure::new(Exit::Config, error))?.measure()),
            false => None,
        };
        let brain = pipeline.brain();
        found.push(Part {
            role: "brain",
            name: brain.name.clone(),
            kind: brain.family.clone(),
            measure,
            keep: dtypes.of_file(&brain.name),
        });
    }
    for stored in pipeline.stored().map_err(|error| Failure::new(Exit::Config, error))? {
        let measure = weights::measure(&stored.files).map_err(|error| Failure::new(Exit::Config, error))?;
        let keep = stored.keep(dtypes).map_err(|error| Failure::words(Exit::Config, error.to_string()))?;
        found.push(Part { role: stored.role, name: stored.name, kind: stored.kind, measure: Some(measure), keep });
    }
    Ok(found)
}

/// A number with three digits or so, and a prefix of its unit.
fn scaled(number: u64, unit: &str) -> String {
    let prefixes = [(1e9, "G"), (1e6, "M"), (1e3, "k")];
    match prefixes.into_iter().find(|(scale, _)| number as f64 >= *scale) {
        Some((scale, prefix)) => format!("{:.1} {prefix}{unit}", number as f64 / scale),
        None => format!("{number} {unit}").trim_end().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::scaled;

    #[test]
    fn numbers_for_people() {
        assert_eq!(
            [scaled(7, ""), scaled(999, "B"), scaled(1_250, "B"), scaled(3_500_000_000, "")],
            ["7", "999 B", "1.2 kB", "3.5 G"]
        );
    }
}
