//! How devices are written: `cpu`, `cpu:0-3`, `cpu:0,2`, `cuda:0`, `cuda:GPU-<uuid>`, `cuda:0,cuda:1`, `metal`.

use std::{fmt, str::FromStr};

use super::{Cores, Error};

/// Devices of one kind, as they are written; whether they are there is another question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spec {
    /// The processor: all of it, shared with whoever else computes on it, or cores of its own.
    Cpu(Option<Cores>),
    /// GPUs of NVIDIA's, at least one, each once.
    Cuda(Vec<Gpu>),
    /// A GPU of Apple's, by number.
    Metal(usize),
}

/// How a GPU is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gpu {
    /// By its place among those that this process can see, from 0.
    Number(usize),
    /// By NVIDIA's name for it, `GPU-...`; also for a part of a GPU, `MIG-...`. It may be cut short.
    Uuid(String),
}

impl FromStr for Spec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |why: String| Error::Malformed { text: text.to_owned(), why };
        let (kind, rest) = text.split_once(':').map_or((text, None), |(kind, rest)| (kind, Some(rest)));
        match (kind, rest) {
            ("cpu", None) => Ok(Self::Cpu(None)),
            ("cpu", Some(cores)) => cores.parse().map(|cores| Self::Cpu(Some(cores))).map_err(wrong),
            ("metal", None) => Ok(Self::Metal(0)),
            ("metal", Some(number)) => {
                number.parse().map(Self::Metal).map_err(|_| wrong("must be numbered: metal:0".to_owned()))
            }
            ("cuda", None) => Ok(Self::Cuda(vec![Gpu::Number(0)])),
            ("cuda", Some(_)) => gpus(text).map(Self::Cuda).map_err(wrong),
            _ => Err(wrong("is of no kind that is known: cpu, cpu:0-3, cuda:0, cuda:GPU-<uuid>, metal".to_owned())),
        }
    }
}

fn gpus(text: &str) -> Result<Vec<Gpu>, String> {
    let mut gpus = Vec::new();
    for part in text.split(',') {
        let Some(name) = part.trim().strip_prefix("cuda:") else {
            return Err("names GPUs, of which each must be written as cuda:0 or cuda:GPU-<uuid>".to_owned());
        };
        let is_uuid = |name: &str| {
            let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
            plain && ["GPU-", "MIG-"].iter().any(|prefix| name.len() > prefix.len() && name.starts_with(prefix))
        };
        let gpu = match name.parse() {
            Ok(number) => Gpu::Number(number),
            Err(_) if is_uuid(name) => Gpu::Uuid(name.to_owned()),
            Err(_) => return Err("must be numbered (cuda:0) or name a GPU by its UUID (cuda:GPU-<uuid>)".to_owned()),
        };
        if gpus.contains(&gpu) {
            return Err(format!("names cuda:{gpu} twice"));
        }
        gpus.push(gpu);
    }
    Ok(gpus)
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Uuid(uuid) => f.write_str(uuid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read() {
        let uuid = "GPU-5a1c24e6-5ad5-9c2b-0b6e-3b1f2f0f7a10";
        for (text, wanted) in [
            ("cpu", Spec::Cpu(None)),
            ("cpu:0-2,5", Spec::Cpu(Some(Cores::from_iter([0, 1, 2, 5])))),
            ("metal", Spec::Metal(0)),
            ("metal:1", Spec::Metal(1)),
            ("cuda", Spec::Cuda(vec![Gpu::Number(0)])),
            ("cuda:3", Spec::Cuda(vec![Gpu::Number(3)])),
            (&format!("cuda:{uuid}"), Spec::Cuda(vec![Gpu::Uuid(uuid.to_owned())])),
            ("cuda:0, cuda:1", Spec::Cuda(vec![Gpu::Number(0), Gpu::Number(1)])),
        ] {
            assert_eq!(text.parse::<Spec>().unwrap(), wanted, "{text}");
        }
    }

    #[test]
    fn what_is_no_device_is_refused_with_the_reason() {
        for (text, wanted) in [
            ("", "of no kind"),
            ("tpu:0", "of no kind"),
            ("cpu:", "range"),
            ("cpu:3-1", "range"),
            ("cpu:0,0", "twice"),
            ("cpu:99999", "beyond"),
            ("cpu:0,cuda:0", "range"),
            ("cuda:x", "must be numbered"),
            ("cuda:GPU-", "must be numbered"),
            ("cuda:GPU-../../etc", "must be numbered"),
            ("cuda:0,1", "each must be written"),
            ("cuda:0,cpu", "each must be written"),
            ("cuda:0,cuda:0", "cuda:0 twice"),
            ("metal:x", "must be numbered"),
        ] {
            let error = text.parse::<Spec>().unwrap_err();
            assert!(matches!(&error, Error::Malformed { text: told, .. } if told == text));
            assert!(error.to_string().contains(wanted) && error.to_string().starts_with("device"), "{error}");
        }
    }
}
