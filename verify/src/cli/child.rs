//! Other commands run to their end, their output kept; an interrupt ends them with this one.

use anyhow::{bail, Context};
use std::collections::BTreeSet;
use std::io::Read;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};

static RUNNING: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// What a command left.
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output; bytes that are no UTF-8 are replaced.
    pub stdout: String,
    /// Its standard error, where that was kept.
    pub stderr: String,
}

impl Ended {
    /// The last line it wrote that holds anything: what a failing command says is there.
    pub fn last_words(&self) -> String {
        let line = |text: &str| text.lines().map(str::trim).rfind(|l| !l.is_empty()).map(str::to_string);
        let said = line(&self.stderr).or_else(|| line(&self.stdout)).unwrap_or_else(|| self.status.to_string());
        said.chars().take(240).collect()
    }
}

/// Runs a command; its standard error is kept, or goes where this command's goes.
pub fn run(command: &mut Command, keep_stderr: bool) -> anyhow::Result<Ended> {
    let name = command.get_program().to_string_lossy().into_owned();
    let stderr = if keep_stderr { Stdio::piped() } else { Stdio::inherit() };
    let mut list = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).spawn();
    let mut child = child.with_context(|| format!("{name}: cannot be run"))?;
    list.insert(child.id());
    drop(list);
    // Two pipes, two readers: a full one would stop the command.
    let errors = child.stderr.take().map(|mut pipe| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before an error is still worth showing.
            let _ = pipe.read_to_end(&mut bytes);
            bytes
        })
    });
    let mut bytes = Vec::new();
    let read = child.stdout.take().map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut bytes));
    let status = child.wait();
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner).remove(&child.id());
    let stderr = match errors.map(std::thread::JoinHandle::join) {
        Some(Ok(bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
        _ => String::new(),
    };
    if let Err(e) = read {
        bail!("{name}: its output cannot be read: {e}");
    }
    Ok(Ended { status: status?, stdout: String::from_utf8_lossy(&bytes).into_owned(), stderr })
}

/// Interrupts all that run.
pub fn interrupt() {
    #[cfg(unix)]
    for &id in RUNNING.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        if let Ok(id) = i32::try_from(id) {
            // SAFETY: a plain system call; the process is a child of this one that was not waited for.
            unsafe { libc::kill(id, libc::SIGINT) };
        }
    }
}
