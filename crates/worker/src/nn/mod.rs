//! Building blocks of models, shared by families of brains and hands.
//!
//! Read in this order: [`ops`] (element-wise operations and norms), [`norm`], [`linear`], [`attention`] (the one attention, with an additive
//! bias), [`linear_attention`] (that of Sana), [`decoder`] (decoder language models by configuration), [`clip`] and [`t5`] (text encoders), [`vision`] (what sees before a language model), [`rotary`] (positions), [`conv`] and [`depthwise`] (convolution), [`rows`] (a batch's rows on
//! threads of their own), `half` (weights in half precision), `product`, `winograd`, `tile` and `kernels` (what runs on CPU).
//!
//! On CPU and in f32 the operations run fused kernels of our own; elsewhere they are composed of candle's. Tests compare the two.
//! Every operation computes each row of a batch in an order that does not depend on the batch.

pub mod attention;
pub mod clip;
pub mod conv;
pub mod decoder;
pub mod depthwise;
mod half;
mod kernels;
pub mod linear;
pub mod linear_attention;
pub mod norm;
pub mod ops;
mod product;
pub mod rotary;
pub mod rows;
pub mod t5;
mod tile;
pub mod vision;
mod winograd;

pub use product::MAX_ROWS;
