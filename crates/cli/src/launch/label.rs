//! Whose line of the log it is.

use efferent_service::telemetry::Format;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, BufReader};

/// Bytes of a line; a longer one is told of in pieces.
const MAX_LINE: u64 = 64 * 1024;

/// Hands on what a worker says, line by line, until it says no more.
pub(crate) async fn relay(from: impl AsyncRead + Unpin, label: &str, format: Format, write: impl Fn(String)) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while (&mut from).take(MAX_LINE).read_until(b'\n', &mut line).await.is_ok_and(|read| read > 0) {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end_matches(['\n', '\r']);
        if !text.is_empty() {
            write(labelled(text, label, format));
        }
        line.clear();
    }
}

/// In text a word before the line, in JSON a field. What is no JSON among JSON (a panic, say) becomes a message.
fn labelled(line: &str, label: &str, format: Format) -> String {
    match (format, serde_json::from_str(line)) {
        (Format::Text, _) => format!("[{label}] {line}"),
        (Format::Json, Ok(Value::Object(mut fields))) => {
            fields.insert("worker".to_owned(), label.into());
            Value::Object(fields).to_string()
        }
        (Format::Json, _) => json!({ "worker": label, "message": line }).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    async fn relayed(text: &[u8], format: Format) -> Vec<String> {
        let lines = RefCell::new(Vec::new());
        relay(text, "hand-3", format, |line| lines.borrow_mut().push(line)).await;
        lines.into_inner()
    }

    #[tokio::test]
    async fn each_line_says_whose_it_is() {
        let text = relayed(b"one\n\n{\"a\": 1}\r\nthree \xff", Format::Text).await;
        assert_eq!(text, ["[hand-3] one", "[hand-3] {\"a\": 1}", "[hand-3] three \u{fffd}"]);
        let json =
            relayed(b"{\"level\":\"INFO\",\"message\":\"hand is ready\"}\nthread panicked\n7\n", Format::Json).await;
        let read = |line: &String| serde_json::from_str::<Value>(line).unwrap();
        assert_eq!(read(&json[0]), json!({ "level": "INFO", "message": "hand is ready", "worker": "hand-3" }));
        assert_eq!(read(&json[1]), json!({ "message": "thread panicked", "worker": "hand-3" }));
        assert_eq!(read(&json[2]), json!({ "message": "7", "worker": "hand-3" }));
    }

    #[tokio::test]
    async fn a_line_without_end_comes_in_pieces() {
        let lines = relayed(&vec![b'x'; MAX_LINE as usize + 10], Format::Text).await;
        assert_eq!(lines.iter().map(String::len).collect::<Vec<_>>(), [MAX_LINE as usize + 9, 19]);
    }
}
