//! Pictures in a terminal: by its own protocol where it has one, else two pixels to a character.

use std::io::Cursor;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use image::{DynamicImage, ImageFormat, RgbImage, imageops::FilterType};

/// Bytes of base64 in one of kitty's messages.
const KITTY_CHUNK: usize = 4096;

/// How a terminal shows pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// Kitty's graphics protocol (kitty, Ghostty, WezTerm).
    Kitty,
    /// iTerm2's inline images.
    Iterm,
    /// Half blocks in 24-bit colour.
    Blocks,
    /// Half blocks in the 256 colours of xterm.
    Xterm,
}

/// How this terminal shows pictures, by what it says of itself; `None` if it shows none.
pub(crate) fn protocol(variable: impl Fn(&str) -> Option<String>) -> Option<Protocol> {
    let term = variable("TERM").filter(|term| term != "dumb" && !term.is_empty())?;
    let program = variable("TERM_PROGRAM").unwrap_or_default();
    // Inside a multiplexer the outer terminal's protocol does not get through.
    let multiplexed = variable("TMUX").is_some() || term.starts_with("screen") || term.starts_with("tmux");
    let kitty = term.contains("kitty") || variable("KITTY_WINDOW_ID").is_some() || program == "ghostty";
    Some(match () {
        () if !multiplexed && (kitty || program == "WezTerm") => Protocol::Kitty,
        () if !multiplexed && program == "iTerm.app" => Protocol::Iterm,
        () if variable("COLORTERM").is_some_and(|it| it == "truecolor" || it == "24bit") => Protocol::Blocks,
        () => Protocol::Xterm,
    })
}

/// Columns of the terminal at stdout.
pub(crate) fn columns() -> u32 {
    u32::from(console::Term::stdout().size().1)
}

/// What to write to show a picture this many columns wide; empty if it cannot be shown.
pub(crate) fn show(picture: &DynamicImage, columns: u32, protocol: Protocol) -> String {
    match protocol {
        Protocol::Kitty => kitty(picture, columns),
        Protocol::Iterm => {
            let png = png(picture);
            format!("\x1b]1337;File=inline=1;size={};width={columns}:{}\x07\n", png.len(), STANDARD.encode(png))
        }
        Protocol::Blocks => blocks(picture, columns, |[r, g, b]| format!("2;{r};{g};{b}")),
        Protocol::Xterm => blocks(picture, columns, |colour| format!("5;{}", xterm(colour))),
    }
}

fn png(picture: &DynamicImage) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let _ = picture.write_to(&mut bytes, ImageFormat::Png);
    bytes.into_inner()
}

fn kitty(picture: &DynamicImage, columns: u32) -> String {
    let data = STANDARD.encode(png(picture));
    let chunks: Vec<&str> =
        (0..data.len()).step_by(KITTY_CHUNK).map(|at| &data[at..data.len().min(at + KITTY_CHUNK)]).collect();
    let mut text = String::new();
    for (index, chunk) in chunks.iter().enumerate() {
        let more = u8::from(index + 1 < chunks.len());
        let first = if index == 0 { format!("a=T,f=100,c={columns},") } else { String::new() };
        text.push_str(&format!("\x1b_G{first}m={more};{chunk}\x1b\\"));
    }
    text.push('\n');
    text
}

/// Rows of upper half blocks: the foreground is the upper pixel, the background the lower one.
fn blocks(picture: &DynamicImage, columns: u32, colour: impl Fn([u8; 3]) -> String) -> String {
    let height = (columns * picture.height() / picture.width().max(1)).max(2).next_multiple_of(2);
    let small: RgbImage = picture.resize_exact(columns.max(1), height, FilterType::Triangle).to_rgb8();
    let mut text = String::new();
    for row in 0..height / 2 {
        for column in 0..small.width() {
            let (upper, lower) = (small.get_pixel(column, row * 2).0, small.get_pixel(column, row * 2 + 1).0);
            text.push_str(&format!("\x1b[38;{};48;{}m\u{2580}", colour(upper), colour(lower)));
        }
        text.push_str("\x1b[0m\n");
    }
    text
}

/// The nearest of xterm's 6 x 6 x 6 colours or 24 greys.
fn xterm(colour: [u8; 3]) -> u8 {
    const LEVELS: [u8; 6] = [0, 95, 135, 175, 215, 255];
    let distance =
        |other: [u8; 3]| -> u32 { colour.iter().zip(other).map(|(a, b)| u32::from(a.abs_diff(b)).pow(2)).sum() };
    let nearest = |value: u8| (0..6u8).min_by_key(|level| value.abs_diff(LEVELS[usize::from(*level)])).unwrap_or(0);
    let cube = colour.map(nearest);
    let cube_colour = cube.map(|level| LEVELS[usize::from(level)]);
    let mean = (colour.iter().map(|value| u32::from(*value)).sum::<u32>() / 3) as u8;
    let grey = (mean.saturating_sub(3) / 10).min(23);
    if distance([8 + 10 * grey; 3]) < distance(cube_colour) {
        232 + grey
    } else {
        16 + 36 * cube[0] + 6 * cube[1] + cube[2]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_known_by_its_variables() {
        let found = |set: &[(&str, &str)]| {
            protocol(|name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
        };
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[("TERM", "dumb")]), None);
        assert_eq!(found(&[("TERM", "xterm")]), Some(Protocol::Xterm));
        assert_eq!(found(&[("TERM", "xterm"), ("COLORTERM", "truecolor")]), Some(Protocol::Blocks));
        assert_eq!(found(&[("TERM", "xterm-kitty")]), Some(Protocol::Kitty));
        assert_eq!(found(&[("TERM", "xterm"), ("TERM_PROGRAM", "iTerm.app")]), Some(Protocol::Iterm));
        assert_eq!(found(&[("TERM", "tmux"), ("KITTY_WINDOW_ID", "1")]), Some(Protocol::Xterm));
    }

    #[test]
    fn colours_are_the_nearest() {
        for (colour, wanted) in
            [([0, 0, 0], 16), ([255, 255, 255], 231), ([255, 0, 0], 196), ([118, 118, 118], 243), ([8, 8, 8], 232)]
        {
            assert_eq!(xterm(colour), wanted, "{colour:?}");
        }
    }

    #[test]
    fn pictures_have_as_many_cells_as_asked_for() {
        let picture = DynamicImage::ImageRgb8(RgbImage::from_pixel(96, 64, image::Rgb([255, 0, 0])));
        let text = show(&picture, 12, Protocol::Blocks);
        assert_eq!((text.lines().count(), text.matches('\u{2580}').count()), (4, 48));
        assert!(text.starts_with("\x1b[38;2;255;0;0;48;2;255;0;0m"));
        assert!(show(&picture, 12, Protocol::Xterm).starts_with("\x1b[38;5;196;48;5;196m"));
        let text = show(&picture, 12, Protocol::Kitty);
        assert!(text.starts_with("\x1b_Ga=T,f=100,c=12,m=") && text.ends_with("\x1b\\\n"));
        assert!(show(&picture, 12, Protocol::Iterm).starts_with("\x1b]1337;File=inline=1;size="));
    }
}
