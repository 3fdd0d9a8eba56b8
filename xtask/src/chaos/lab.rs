//! Hosts on this machine: network namespaces on a bridge, between which traffic can be broken.
//!
//! The bridge has a namespace of its own, so nothing is added to the machine's network, and two labs never
//! meet. Needs root, `ip` and `nft`; `delay` also `python3` and `ethtool`, as many kernels have no netem.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::process;

const SHIM: &str = include_str!("delay.py");

/// The hosts; all is taken down when this is dropped.
#[derive(Debug)]
pub(crate) struct Lab {
    tag: String,
    hosts: usize,
    shim: PathBuf,
    delayed: Vec<(usize, Child)>,
}

impl Lab {
    /// Why there can be none here, if so.
    pub(super) fn impossible() -> Option<String> {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let user = status.lines().find_map(|line| line.strip_prefix("Uid:"));
        if user.and_then(|ids| ids.split_ascii_whitespace().next()) != Some("0") {
            return Some("network namespaces need root".to_owned());
        }
        let missing = ["ip", "nft", "python3", "ethtool"].into_iter();
        let missing: Vec<_> =
            missing.filter(|name| process::find_program(name).is_none()).collect();
        if !missing.is_empty() {
            return Some(format!("{} not found (iproute2, nftables, ethtool)", missing.join(", ")));
        }
        let tag = format!("pc{}-try", std::process::id());
        let made = run("ip", &["netns", "add", &tag]).err().map(|error| format!("{error:#}"));
        if made.is_none() {
            run("ip", &["netns", "del", &tag]).ok(); // It was made to see whether it can be.
        }
        made
    }

    /// Hosts `0..hosts`, all of which reach each other.
    pub(super) fn up(hosts: usize, shim: PathBuf) -> Result<Self> {
        ensure!(hosts <= 250, "a lab has at most 250 hosts");
        fs::write(&shim, SHIM).with_context(|| shim.display().to_string())?;
        let lab = Self { tag: format!("pc{}", std::process::id()), hosts, shim, delayed: vec![] };
        let hub = lab.hub();
        run("ip", &["netns", "add", &hub])?;
        let hub_ip = |arguments: &[&str]| run("ip", &[&["-n", &hub], arguments].concat());
        hub_ip(&["link", "set", "lo", "up"])?;
        hub_ip(&["link", "add", "br0", "type", "bridge", "forward_delay", "0"])?;
        hub_ip(&["link", "set", "br0", "up"])?;
        lab.nft("add table bridge lab")?;
        lab.nft(
            "add chain bridge lab faults { type filter hook forward priority 0; policy accept; }",
        )?;
        for host in 0..hosts {
            let (name, port, address) = (lab.name(host), port(host), address(host));
            run("ip", &["netns", "add", &name])?;
            run("ip", &["-n", &name, "link", "set", "lo", "up"])?;
            let pair = ["netns", &hub, "type", "veth", "peer", "name", "eth0", "netns", &name];
            run("ip", &[&["link", "add", &port][..], &pair].concat())?;
            hub_ip(&["link", "set", &port, "master", "br0", "up"])?;
            run("ip", &["-n", &name, "addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
            run("ip", &["-n", &name, "link", "set", "eth0", "up"])?;
        }
        Ok(lab)
    }

    /// What comes before a program's own words to run it on a host.
    pub(super) fn prefix(&self, host: usize) -> [String; 4] {
        ["ip".to_owned(), "netns".to_owned(), "exec".to_owned(), self.name(host)]
    }

    /// Drops all that one host sends to the others.
    pub(super) fn cut_from(&self, host: usize) -> Result<()> {
        self.rule(&format!("ip saddr {} drop", address(host)))
    }

    /// Drops all that the others send to one host.
    pub(super) fn cut_to(&self, host: usize) -> Result<()> {
        self.rule(&format!("ip daddr {} drop", address(host)))
    }

    /// Drops so many of a hundred packets of a host, in both directions.
    pub(super) fn lose(&self, host: usize, percent: u32) -> Result<()> {
        for side in ["saddr", "daddr"] {
            let address = address(host);
            self.rule(&format!("ip {side} {address} numgen random mod 100 < {percent} drop"))?;
        }
        Ok(())
    }

    /// Delays all that comes from and goes to a host, by so many milliseconds each way.
    pub(super) fn delay(&mut self, host: usize, ms: u32) -> Result<()> {
        let (hub, port) = (self.hub(), port(host));
        let (inner, outer) = (format!("q{host}"), format!("r{host}"));
        let ip = |arguments: &[&str]| run("ip", &[&["-n", &hub], arguments].concat());
        ip(&["link", "add", &inner, "type", "veth", "peer", "name", &outer])?;
        ip(&["link", "set", &inner, "up"])?;
        ip(&["link", "set", &outer, "up"])?;
        // Frames pass through a program: they are whole, and their checksums are right.
        let plain = ["tso", "off", "gso", "off", "gro", "off", "tx", "off"];
        for link in [&port, &inner, &outer] {
            run("ip", &[&["netns", "exec", &hub, "ethtool", "-K", link][..], &plain].concat())?;
        }
        for other in 0..self.hosts {
            let name = self.name(other);
            run("ip", &[&["netns", "exec", &name, "ethtool", "-K", "eth0"][..], &plain].concat())?;
        }
        let mut shim = Command::new("ip")
            .args(["netns", "exec", &hub, "python3"])
            .arg(&self.shim)
            .args([&port, &inner, &ms.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the delay")?;
        let stdout = shim.stdout.take().context("the delay has no output")?;
        self.delayed.push((host, shim));
        let mut ready = String::new();
        BufReader::new(stdout).read_line(&mut ready).context("the delay says nothing")?;
        ensure!(ready.trim() == "ready", "the delay did not start");
        // Only now, as a busy machine takes seconds to start it, and nobody is to be cut off.
        ip(&["link", "set", &port, "nomaster"])?;
        ip(&["link", "set", &outer, "master", "br0"])
    }

    /// All is as at the beginning.
    pub(super) fn heal(&mut self) -> Result<()> {
        self.nft("flush chain bridge lab faults")?;
        let hub = self.hub();
        for (host, mut shim) in std::mem::take(&mut self.delayed) {
            shim.kill().and_then(|()| shim.wait()).context("the delay cannot be ended")?;
            run("ip", &["-n", &hub, "link", "del", &format!("q{host}")])?;
            run("ip", &["-n", &hub, "link", "set", &port(host), "master", "br0"])?;
        }
        Ok(())
    }

    fn rule(&self, rule: &str) -> Result<()> {
        self.nft(&format!("add rule bridge lab faults {rule}"))
    }

    fn nft(&self, words: &str) -> Result<()> {
        run("ip", &["netns", "exec", &self.hub(), "nft", words])
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.tag)
    }

    fn name(&self, host: usize) -> String {
        format!("{}-h{host}", self.tag)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for (_, shim) in &mut self.delayed {
            shim.kill().and_then(|()| shim.wait().map(drop)).ok(); // It may have ended.
        }
        for name in (0..self.hosts).map(|host| self.name(host)).chain([self.hub()]) {
            run("ip", &["netns", "del", &name]).ok(); // It may not have been made.
        }
    }
}

/// Where a host is reached.
pub(super) fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

fn port(host: usize) -> String {
    format!("p{host}")
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {program}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    bail!("`{program} {}` failed: {}", arguments.join(" "), said.trim());
}
