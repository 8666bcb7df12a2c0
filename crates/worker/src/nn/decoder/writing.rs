//! A decoder that writes text: what it has read is kept, so that each token is read once.

use candle_core::{D, DType, Result, Tensor};

use super::{super::half, Decoder, Sight};
use crate::weights::Weights;

/// Tokens that are weighed at once.
const HEAD_ROWS: usize = 8192;

/// Keys and values of what a decoder has read of one sequence.
#[derive(Debug)]
pub struct Cache {
    /// (1, tokens, key heads, width) each
    pub(super) layers: Vec<Option<(Tensor, Tensor)>>,
    pub(super) tokens: usize,
    /// Where the next token is.
    pub(super) next: u32,
}

impl Cache {
    /// Tokens that were read.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

impl Decoder {
    /// Takes what predicts tokens, by this name; without it the table of embeddings does.
    ///
    /// # Errors
    /// Never on weights of that shape.
    pub fn with_head(mut self, weights: &mut Weights, name: &str) -> Self {
        let shape = [self.config.vocabulary, self.config.width];
        self.head = weights.contains(name).then(|| weights.matrix(name, &shape));
        self
    }

    /// For a sequence of which nothing was read yet.
    pub fn cache(&self) -> Cache {
        Cache { layers: vec![None; self.layers.len()], tokens: 0, next: 0 }
    }

    /// Reads on in a sequence, (1, tokens, width), and gives the states after the last layer. After an error the cache is of no use.
    ///
    /// # Errors
    /// Those of [`Decoder::states_with`].
    pub fn read_on(&self, embeddings: &Tensor, sight: &Sight, cache: &mut Cache) -> Result<Tensor> {
        let (_, tokens, _) = embeddings.dims3()?;
        let all = Tensor::ones((1, cache.tokens + tokens), DType::F32, self.device())?;
        let mut states = self.run(embeddings, &all, &[self.layers.len()], sight, Some(cache))?;
        cache.tokens += tokens;
        let last = sight.places.iter().flatten().max();
        cache.next = last.map_or(cache.next + tokens as u32, |last| last + 1);
        states.pop().ok_or_else(|| candle_core::Error::msg("no states"))
    }

    /// The likeliest next token after states (1, tokens, width) after the last layer, the last of which counts.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn likeliest(&self, states: &Tensor) -> Result<u32> {
        let (_, tokens, width) = states.dims3()?;
        let last = self.final_norm(&states.narrow(1, tokens - 1, 1)?.contiguous()?)?.reshape((1, width))?;
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        // Piece by piece: in half precision a piece is made f32 where there is no arithmetic for it.
        let pieces = (0..self.config.vocabulary).step_by(HEAD_ROWS).map(|start| {
            let rows = HEAD_ROWS.min(self.config.vocabulary - start);
            half::matmul(&last, &half::operand(&head.narrow(0, start, rows)?)?.t()?)
        });
        Tensor::cat(&pieces.collect::<Result<Vec<_>>>()?, 1)?.argmax(D::Minus1)?.squeeze(0)?.to_scalar()
    }

    /// Writes on after what stands in a sequence, the likeliest token each time, until one of `until`, which is left out, or `most` are written.
    ///
    /// # Errors
    /// Those of [`Decoder::read_on`].
    pub fn write(&self, embeddings: &Tensor, sight: &Sight, until: &[u32], most: usize) -> Result<Vec<u32>> {
        let (mut cache, mut written) = (self.cache(), Vec::new());
        let mut states = self.read_on(embeddings, sight, &mut cache)?;
        while written.len() < most {
            let next = self.likeliest(&states)?;
            if until.contains(&next) {
                break;
            }
            written.push(next);
            let next = self.embed(&Tensor::new(&[[next]], self.device())?)?;
            states = self.read_on(&next, &Sight::default(), &mut cache)?;
        }
        Ok(written)
    }
}
