//! A program that keeps a model in memory and answers timing requests, one line each: `pocketglm bench --serve` and
//! `peers serve`.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use serde_json::Value;

use crate::{Error, Result, repo};

/// The running program. It is ended when this is dropped: it holds nothing that could be lost.
pub struct Resident {
    shown: String,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// What it said about itself when it was ready.
    pub facts: Value,
    started: Instant,
}

impl Drop for Resident {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Resident {
    /// Starts it and waits until it is ready.
    pub fn start(mut command: Command) -> Result<Resident> {
        let shown = repo::shown(&command);
        let failed = |what: String| Error::Command { command: shown.clone(), what };
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| failed(format!("cannot run: {e}")))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("has no pipes".into()));
        };
        let stdout = BufReader::new(stdout);
        let mut resident = Resident { shown, child, stdin, stdout, facts: Value::Null, started };
        resident.facts = resident.line()?;
        if resident.facts["ready"] != true {
            return Err(resident.wrong("a line that says it is ready", &resident.facts));
        }
        Ok(resident)
    }

    /// Sends a request and waits for the answer.
    pub fn ask(&mut self, request: &str) -> Result<Value> {
        writeln!(self.stdin, "{request}").and_then(|()| self.stdin.flush()).map_err(|e| Error::Command {
            command: self.shown.clone(),
            what: format!("takes no requests any more: {e}"),
        })?;
        let answer = self.line()?;
        match answer["error"].as_str() {
            Some(why) => Err(Error::Command {
                command: self.shown.clone(),
                what: format!("cannot answer `{request}`: {why}"),
            }),
            None => Ok(answer),
        }
    }

    /// Sends a request and gives the `seconds` of the answer.
    pub fn seconds(&mut self, request: &str) -> Result<f64> {
        let answer = self.ask(request)?;
        answer["seconds"]
            .as_f64()
            .filter(|s| *s > 0.0)
            .ok_or_else(|| self.wrong("`seconds` above 0", &answer))
    }

    /// Seconds since it was started.
    pub fn age(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line);
        let failed = |what: String| Error::Command { command: self.shown.clone(), what };
        match read {
            Err(e) => Err(failed(format!("cannot be read: {e}"))),
            Ok(0) => Err(failed("ended without an answer".into())),
            Ok(_) => {
                serde_json::from_str(&line).map_err(|_| failed(format!("printed no JSON: {}", line.trim())))
            }
        }
    }

    fn wrong(&self, wanted: &str, found: &Value) -> Error {
        Error::Content { place: self.shown.clone(), wanted: wanted.into(), found: found.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_does_not_speak_the_protocol_is_named() {
        let mut git = Command::new("git");
        git.arg("--version");
        let error = Resident::start(git).err().unwrap().to_string();
        assert!(error.contains("git --version") && error.contains("no JSON"), "{error}");
        let error = Resident::start(Command::new("no-such-program")).err().unwrap().to_string();
        assert!(error.contains("no-such-program") && error.contains("cannot run"), "{error}");
    }
}
