//! What both programs do around a command: parse, watch signals, render the outcome or the fault, choose the exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use cotk_kernels::cpu::dispatch::Isa;
use serde_json::json;

use crate::commands::{Cli, Command};
use crate::context::{Context, Outcome};
use crate::fault::{FAILED, Fault};

/// Commands that go on where they were when the same line is typed again.
const RESUMING: [&str; 3] = ["compress", "profile", "search"];

/// Parses the command line and runs one command.
pub fn launch(run: impl FnOnce(&Command, &Context) -> Result<Outcome, Fault>) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return argument_error(&error),
    };
    let cx = match Context::new(&cli) {
        Ok(cx) => cx,
        Err(fault) => return render_fault(&fault, cli.command.name(), cli.global.json),
    };
    let slow = slow_path(&cli.command);
    // In the one JSON object where it comes last; `serve` prints its own long before that.
    let is_said_now = !cx.ui.is_json() || matches!(cli.command, Command::Serve(_));
    if let (Some(text), true) = (&slow, is_said_now) {
        complain(&format!("warning: {text}"));
    }
    let mut result = run(&cli.command, &cx);
    if let (Some(text), false, Ok(outcome)) = (slow, is_said_now, &mut result) {
        outcome.warnings.push(text);
    }
    cx.ui.finish();
    match result {
        Ok(outcome) => render(&outcome, cli.command.name(), cx.ui.is_json()),
        Err(fault) => render_fault(&fault, cli.command.name(), cx.ui.is_json()),
    }
}

/// What to say of a command that computes with weights on the scalar path.
fn slow_path(command: &Command) -> Option<String> {
    let computes = matches!(
        command,
        Command::Run(_)
            | Command::Eval(_)
            | Command::Logits(_)
            | Command::Compress(_)
            | Command::Serve(_)
            | Command::Bench(_)
    );
    let lowest = Isa::present()[0].name();
    if !computes || Isa::selected().is_ok_and(|isa| isa.name() != lowest) {
        return None;
    }
    let why = match Isa::present().len() {
        1 => "this CPU has no AVX2".to_owned(),
        _ => format!("COTK_ISA={lowest}"),
    };
    // A path that is not there at all is the command's to refuse.
    Isa::selected()
        .is_ok()
        .then(|| format!("{why}: computing on the {lowest} path, many times slower than with AVX2"))
}

fn render(outcome: &Outcome, command: &str, json: bool) -> ExitCode {
    if json {
        if !outcome.is_printed {
            let envelope = envelope_ok(command, &outcome.result, &outcome.warnings);
            print_line(&envelope.to_string());
        }
    } else {
        if !outcome.text.is_empty() {
            print_line(outcome.text.trim_end());
        }
        for warning in &outcome.warnings {
            complain(&format!("warning: {warning}"));
        }
    }
    ExitCode::from(outcome.exit_code)
}

/// The success form of `--json` (DESIGN 4).
pub fn envelope_ok(command: &str, result: &serde_json::Value, warnings: &[String]) -> serde_json::Value {
    json!({ "cotk": env!("CARGO_PKG_VERSION"), "command": command, "ok": true, "result": result, "warnings": warnings })
}

fn render_fault(fault: &Fault, command: &str, json: bool) -> ExitCode {
    let mut report = fault.report();
    if matches!(report.kind, "interrupted" | "disk-full") && RESUMING.contains(&command) {
        let first = report.help.map(|help| format!("{help}, then ")).unwrap_or_default();
        report.help = Some(format!("{first}run the same command again: it resumes"));
    }
    if json {
        // Absent fields are null, so that a reader finds every key (DESIGN 4).
        let error = json!({
            "kind": report.kind, "message": report.message, "help": report.help, "file": report.file,
            "key": report.key, "found": report.found, "expected": report.expected,
        });
        print_line(
            &json!({ "cotk": env!("CARGO_PKG_VERSION"), "command": command, "ok": false, "error": error }).to_string(),
        );
    } else {
        complain(&format!("error: {}", report.message));
        if let Some(help) = &report.help {
            complain(&format!("help: {help}"));
        }
    }
    ExitCode::from(report.exit_code)
}

fn argument_error(error: &clap::Error) -> ExitCode {
    use clap::CommandFactory;
    use clap::error::{ContextKind, ErrorKind};
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print(); // a closed pipe is success
        return ExitCode::SUCCESS;
    }
    if std::env::args().any(|arg| arg == "--json") {
        let typed = std::env::args()
            .skip(1)
            .find(|arg| Cli::command().find_subcommand(arg).is_some());
        let command = typed.unwrap_or_default();
        // Up to the usage, which help repeats: "the following required arguments were not provided: --prompt <TEXT>".
        let text = error.to_string();
        let said = text
            .lines()
            .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
            .map(str::trim)
            .filter(|line| !line.is_empty());
        let message = said
            .collect::<Vec<_>>()
            .join(" ")
            .trim_start_matches("error: ")
            .to_owned();
        let help = if command.is_empty() {
            "cotk --help".to_owned()
        } else {
            format!("cotk {command} --help")
        };
        let key = [ContextKind::InvalidArg, ContextKind::InvalidSubcommand]
            .into_iter()
            .find_map(|kind| error.get(kind))
            .map(ToString::to_string);
        return render_fault(&Fault::Arguments { message, help, key }, &command, true);
    }
    let _ = error.print();
    ExitCode::from(2)
}

/// One line on standard output. A closed pipe is success: whoever read it has what they wanted. Anything else (a full
/// disk behind a redirection) ends the program with 1: what was computed did not arrive.
pub fn print_line(text: &str) {
    write_out(&format!("{text}\n"));
}

/// Text on standard output as it comes; whether somebody still reads. Fails as [`print_line`].
pub fn write_out(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => true,
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => false,
        Err(error) => {
            complain(&format!("error: cannot write to standard output: {error}"));
            std::process::exit(i32::from(FAILED));
        }
    }
}

/// One line on standard error.
pub fn complain(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
