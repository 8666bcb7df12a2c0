//! Pictures that requests bring or refer to: kept in the object store, where the hand finds them.

use std::io::Cursor;

use bytes::Bytes;
use efferent_bus::ledger::Ledger;
use efferent_proto::{
    ApiError,
    v1::{ErrorCode, GenerateRequest, Model, PictureSource, Size, picture_source::Source},
    work::{self, offers_size},
};
use futures::StreamExt as _;
use image::{ImageDecoder as _, ImageReader, metadata::Orientation};

use crate::images::unavailable;

/// Most pixels of a picture for a brain to read. It is scaled to a million or so, but must be held in memory before.
const MAX_REFERENCE_PIXELS: u64 = 50_000_000;

/// Checks the pictures of a request as far as their beginnings tell, and has a request without a size be as large as the one that it begins with: rounded down to what the model offers, or left open.
///
/// # Errors
/// If a file is not kept, or does not begin as a picture.
pub async fn fit(ledger: &Ledger, request: &mut GenerateRequest, model: &Model) -> Result<(), ApiError> {
    // What a model does not offer is refused for that.
    if request.reference_images.len() <= model.max_reference_images as usize {
        let field = "reference_images";
        for source in &request.reference_images {
            let Size { width, height } = size(ledger, field, source).await?;
            if u64::from(width) * u64::from(height) > MAX_REFERENCE_PIXELS {
                let message =
                    format!("{field}: a picture of {width}x{height} pixels, over {MAX_REFERENCE_PIXELS} pixels");
                let error = ApiError::new(ErrorCode::LimitExceeded, message).field(field);
                return Err(error.limit(MAX_REFERENCE_PIXELS.to_string()));
            }
        }
    }
    if !model.image_to_image {
        return Ok(());
    }
    let mut found = None;
    for (field, source) in [("mask", &request.mask), ("init_image", &request.init_image)] {
        if let Some(source) = source {
            found = Some(size(ledger, field, source).await?);
        }
    }
    if let (None, Some(found)) = (request.size, found) {
        let multiple = model.size_range.map_or(1, |range| range.multiple.max(1));
        let down = |side: u32| side - side % multiple;
        let wanted = Size { width: down(found.width), height: down(found.height) };
        request.size = Some(wanted).filter(|size| offers_size(model, *size));
    }
    Ok(())
}

/// Puts the files that a request brings into the object store, and their hashes into the request.
///
/// # Errors
/// If the store is unavailable.
pub async fn keep(ledger: &Ledger, request: &mut GenerateRequest) -> Result<(), ApiError> {
    for source in work::pictures_mut(request) {
        if let Some(Source::Data(bytes)) = &source.source {
            let retention = Some(ledger.options().retention);
            let hash = ledger.bus().put_object(bytes.clone(), retention).await.map_err(unavailable)?;
            source.source = Some(Source::Hash(hash));
        }
    }
    Ok(())
}

async fn size(ledger: &Ledger, field: &str, source: &PictureSource) -> Result<Size, ApiError> {
    let invalid = |message: String| ApiError::new(ErrorCode::InvalidField, message).field(field);
    let beginning = match &source.source {
        Some(Source::Data(bytes)) => bytes.clone(),
        Some(Source::Hash(hash)) => {
            let object = ledger.bus().get_object(hash).await.map_err(unavailable)?;
            let mut chunks =
                object.ok_or_else(|| invalid(format!("{field} refers to {hash}, which is not in the object store")))?;
            chunks.next().await.transpose().map_err(unavailable)?.unwrap_or_default()
        }
        None => Bytes::new(),
    };
    let reader = ImageReader::new(Cursor::new(beginning)).with_guessed_format().map_err(image::ImageError::from);
    let mut decoder = reader.and_then(ImageReader::into_decoder).map_err(|error| {
        invalid(format!("{field} is not a picture that can be read: {error}")).limit("png, jpeg, webp")
    })?;
    let (width, height) = decoder.dimensions();
    let lies = matches!(
        decoder.orientation(),
        Ok(Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH)
    );
    let (width, height) = if lies { (height, width) } else { (width, height) };
    Ok(Size { width, height })
}
