//! The one place that writes to stdout and stderr.
//!
//! Stdout carries results only (paths, tables, JSON), so that it can be piped; everything said to a person goes to stderr.

use std::{
    fmt::Display,
    io::{self, Write as _},
};

use crate::exit::{Exit, Failure};

/// Writes a line to stdout.
///
/// # Errors
/// [`Failure::Pipe`] if nobody reads any more.
pub(crate) fn line(text: impl Display) -> Result<(), Failure> {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes bytes to stdout as they are.
///
/// # Errors
/// [`Failure::Pipe`] if nobody reads any more.
pub(crate) fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::Pipe,
        _ => Failure::new(Exit::File, anyhow::Error::new(error).context("cannot write to stdout")),
    })
}

/// Says something to a person. Whether anyone hears it changes nothing.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Columns of text, aligned, two spaces apart; the first row is the heading.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let lines = rows.iter().map(|row| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["NAME".to_owned(), "N".to_owned()], vec!["é".to_owned(), "12".to_owned()]];
        assert_eq!(table(&rows), "NAME  N\né     12");
        assert_eq!(table(&[]), "");
    }
}
