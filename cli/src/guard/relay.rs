//! A door on this machine that leads to the coordinator wherever it is by now: a file that all nodes see has its
//! address, and is read anew for each connection.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tracing::warn;

const CONNECT_MAX: Duration = Duration::from_secs(2);
/// After an error of the system, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// Opens the door; returns where it is.
pub(super) async fn start(file: PathBuf) -> Result<SocketAddr> {
    let listener =
        TcpListener::bind("127.0.0.1:0").await.context("cannot listen for the worker")?;
    let address = listener.local_addr().context("cannot listen for the worker")?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((inside, _)) => drop(tokio::spawn(pass(inside, file.clone()))),
                Err(error) => {
                    warn!(%error, "a connection of the worker could not be taken");
                    sleep(PAUSE).await;
                }
            }
        }
    });
    Ok(address)
}

/// The address in `file`, if there is one.
pub(super) fn read_address(file: &Path) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?; // Not there before the first coordinator.
    let address = text.trim();
    (!address.is_empty()).then(|| address.to_owned())
}

/// Carries bytes both ways until one side is done. If there is nobody, `inside` is closed.
async fn pass(mut inside: TcpStream, file: PathBuf) {
    let Some(address) = read_address(&file) else { return };
    let connected = timeout(CONNECT_MAX, TcpStream::connect(&address)).await;
    let Ok(Ok(mut outside)) = connected else { return };
    inside.set_nodelay(true).ok(); // Slower, but right.
    outside.set_nodelay(true).ok();
    copy_bidirectional(&mut inside, &mut outside).await.ok(); // A side that breaks closes the other.
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Answers each connection with `word`.
    async fn says(word: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                stream.write_all(word.as_bytes()).await.unwrap();
            }
        });
        address
    }

    async fn heard(door: SocketAddr) -> String {
        let mut stream = TcpStream::connect(door).await.unwrap();
        let mut heard = String::new();
        stream.read_to_string(&mut heard).await.unwrap();
        heard
    }

    #[tokio::test]
    async fn a_connection_goes_to_whoever_the_file_names_by_then() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("address");
        let door = start(file.clone()).await.unwrap();
        assert_eq!(heard(door).await, "", "nobody is there yet");
        std::fs::write(&file, says("first").await.to_string()).unwrap();
        assert_eq!(heard(door).await, "first");
        std::fs::write(&file, says("second").await.to_string()).unwrap();
        assert_eq!(heard(door).await, "second");
    }
}
