//! Runs a command beside an S3 server that ends with it: its environment says how to reach the server, whose
//! only bucket is `test`, and where to cache what is read from there.
//!
//! ```text
//! cargo run --release -p testing --example with_s3 -- COMMAND [ARGUMENT…]
//! ```

use std::{
    env,
    process::{Command, ExitCode},
};

use testing::S3Server;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut words = env::args_os().skip(1);
    let program = words.next().expect("the command to run is the first argument");
    let cache = tempfile::tempdir().expect("a temporary folder can be made");
    let server = S3Server::start().await;
    let mut command = Command::new(program);
    command.args(words).envs(server.variables()).env("PERCHERON_DATA_CACHE", cache.path());
    let status = command.status().expect("the command can be run");
    if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
