//! `efferent ready`: one HTTP request to an admin port, for health checks in containers that have no other client.

use std::{
    io::{Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    time::Duration,
};

use crate::{
    exit::{Exit, Failure},
    output,
};

const TIMEOUT: Duration = Duration::from_secs(3);
/// An answer is a line; more than this of it is not read.
const MAX_ANSWER: u64 = 4096;

/// Asks `/readyz` and prints the answer.
///
/// # Errors
/// If the process does not answer, or takes no work.
pub(crate) fn ask(address: &str) -> Result<(), Failure> {
    let (status, body) = get(address).map_err(|error| {
        let error = anyhow::Error::new(error).context(format!("no process answers at {address}"));
        Failure::new(Exit::Unavailable, error)
    })?;
    if status != "200" {
        return Err(Failure::words(Exit::Unavailable, format!("{address}: {body}")));
    }
    output::line(body)
}

/// The status code and the body, in a line.
fn get(address: &str) -> std::io::Result<(String, String)> {
    let unknown = || std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
    let address = address.to_socket_addrs()?.next().ok_or_else(unknown)?;
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // Version 1.0: the answer ends with the connection.
    write!(stream, "GET /readyz HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.split_whitespace().nth(1).unwrap_or_default().to_owned();
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.trim().replace('\n', "; ")).unwrap_or_default();
    Ok((status, body))
}
