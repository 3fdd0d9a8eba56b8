//! A proxy in front of an HTTP/1.1 server, which breaks the exchanges that a test asks for.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// How an exchange is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breakage {
    /// The connection breaks; the server hears nothing.
    ResetBefore,
    /// The server does what it was asked, and the connection breaks instead of an answer.
    ResetAfter,
    /// `503 Slow Down`; the server hears nothing.
    SlowDown,
    /// The server does what it was asked, and the answer is `503`.
    SlowDownAfter,
    /// One bit of the answer's body is flipped.
    Corrupt,
}

/// Which exchanges are broken, and how: the first that fit, so many.
#[derive(Debug, Clone)]
pub struct Rule {
    /// `PUT` or `GET`.
    pub method: &'static str,
    /// What the request's path contains.
    pub path: &'static str,
    /// How each is broken.
    pub breakage: Breakage,
    /// How many.
    pub times: u32,
}

/// The proxy; it ends when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    rules: Arc<Mutex<VecDeque<Rule>>>,
    serving: JoinHandle<()>,
}

const SLOW_DOWN: &[u8] =
    b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

impl Proxy {
    /// Stands before the server on `port` of this machine.
    ///
    /// # Panics
    /// If no port is free.
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let own_port = listener.local_addr().expect("it listens").port();
        let rules = Arc::new(Mutex::new(VecDeque::new()));
        let serving = tokio::spawn(serve(listener, port, rules.clone()));
        Self { port: own_port, rules, serving }
    }

    /// The port that it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Breaks exchanges from now on.
    pub fn add(&self, rule: Rule) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).push_back(rule);
    }

    /// How many exchanges are still to be broken.
    #[must_use]
    pub fn left(&self) -> u32 {
        let rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.iter().map(|rule| rule.times).sum()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(listener: TcpListener, port: u16, rules: Arc<Mutex<VecDeque<Rule>>>) {
    while let Ok((client, _)) = listener.accept().await {
        let rules = rules.clone();
        // A client that goes away, or is made to, is what this is for.
        tokio::spawn(async move { exchange(client, port, &rules).await.ok() });
    }
}

/// One request and its answer; the connection is then closed.
async fn exchange(
    mut client: TcpStream,
    port: u16,
    rules: &Mutex<VecDeque<Rule>>,
) -> io::Result<()> {
    let request = read_request(&mut client).await?;
    let line = request.split(|&byte| byte == b'\r').next().unwrap_or_default();
    let breakage = take(rules, &String::from_utf8_lossy(line));
    match breakage {
        Some(Breakage::ResetBefore) => return reset(&client),
        Some(Breakage::SlowDown) => return client.write_all(SLOW_DOWN).await,
        Some(Breakage::ResetAfter | Breakage::SlowDownAfter | Breakage::Corrupt) | None => {}
    }
    let mut answer = Vec::new();
    let mut server = TcpStream::connect(("127.0.0.1", port)).await?;
    server.write_all(&request).await?;
    server.read_to_end(&mut answer).await?;
    match breakage {
        Some(Breakage::ResetAfter) => return reset(&client),
        Some(Breakage::SlowDownAfter) => return client.write_all(SLOW_DOWN).await,
        Some(Breakage::Corrupt) => {
            if let Some(last) = answer.last_mut() {
                *last ^= 1;
            }
        }
        Some(Breakage::ResetBefore | Breakage::SlowDown) | None => {}
    }
    client.write_all(&answer).await?;
    client.shutdown().await
}

/// Head and body, with `Connection: close` put in so that the server ends its answer by closing.
async fn read_request(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut read = Vec::new();
    let head = loop {
        if let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if client.read_buf(&mut read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    };
    let text = String::from_utf8_lossy(&read[..head]).into_owned();
    let body_bytes = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(0, |(_, value)| value.trim().parse().unwrap_or(0_usize));
    while read.len() < head + 4 + body_bytes {
        if client.read_buf(&mut read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let mut request = read[..head].to_vec();
    request.extend_from_slice(b"\r\nConnection: close");
    request.extend_from_slice(&read[head..]);
    Ok(request)
}

/// The breakage that is due for a request with this first line.
fn take(rules: &Mutex<VecDeque<Rule>>, line: &str) -> Option<Breakage> {
    let (method, path) = line.split_once(' ')?;
    let mut rules = rules.lock().unwrap_or_else(PoisonError::into_inner);
    let fits =
        |rule: &&mut Rule| rule.times > 0 && rule.method == method && path.contains(rule.path);
    let rule = rules.iter_mut().find(fits)?;
    rule.times -= 1;
    Some(rule.breakage)
}

/// Closes so that the other side sees an error, not an end.
fn reset(client: &TcpStream) -> io::Result<()> {
    client.set_zero_linger()
}
