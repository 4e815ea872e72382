//! The report of a finished migration: JSON for programs, one HTML page without scripts for people.

use std::fmt::Write;
use std::path::PathBuf;

use super::migrate::Migration;
use crate::error::{Error, Kind, Result};
use crate::io::atomic;
use crate::unit::bytes::human;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}\
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}\
td{padding:.2rem 1rem .2rem 0;vertical-align:top}td:first-child{color:#666;white-space:nowrap}\
code,pre{font:13px/1.4 ui-monospace,monospace;overflow-wrap:anywhere}\
pre{background:#f6f6f6;padding:1rem;overflow-x:auto}.warn{color:#a40}";

/// Writes `report.json` and `report.html` into the job's folder; returns the page's path.
pub fn write(job: &Migration) -> Result<PathBuf> {
    let json = serde_json::to_vec_pretty(&job.record).map_err(|error| {
        Error::new(Kind::Internal, "report.encode", "cannot encode the report").caused_by(error)
    })?;
    atomic::write(&job.folder().join("report.json"), &json)?;
    let page = job.folder().join("report.html");
    atomic::write(&page, html(job).as_bytes())?;
    Ok(page)
}

fn html(job: &Migration) -> String {
    let (record, results) = (&job.record, &job.record.results);
    let counter = |name: &str| human(results.counters.get(name).copied().unwrap_or(0));
    let mut seconds: Vec<(String, f64)> = Vec::new();
    for (step, took) in &results.seconds {
        match seconds.iter_mut().find(|(known, _)| known == step) {
            Some((_, sum)) => *sum += took,
            None => seconds.push((step.clone(), *took)),
        }
    }
    let times: Vec<_> = seconds.iter().map(|(step, took)| format!("{step} {took:.1} s")).collect();
    let rows = [
        ("Job", record.id.clone()),
        ("Begun", record.created.clone()),
        ("Image", results.image.clone().unwrap_or_default()),
        ("Source", record.options.source.to_string()),
        ("Guest", results.guest.clone()),
        ("Declared as", format!("{}, {}", results.os, results.boot)),
        ("Disk", human(results.size)),
        ("Read", counter("read")),
        ("Skipped (unused)", counter("skipped")),
        ("Sent", counter("written")),
        ("Image size", human(results.image_bytes)),
        ("Time", times.join(", ")),
        ("Source root", results.source_root.clone()),
        ("Image root", results.image_root.clone()),
        ("Copied while in use", if record.options.inconsistent { "yes" } else { "no" }.to_owned()),
    ];
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>haul {}</title><style>{STYLE}</style>\n\
         <h1>Migration of {} to {}</h1>\n<table>\n",
        escape(&record.id),
        escape(&record.options.source.to_string()),
        escape(results.image.as_deref().unwrap_or("an image")),
    );
    for (name, value) in rows {
        let _ = writeln!(page, "<tr><td>{name}<td><code>{}</code></tr>", escape(&value));
    }
    page.push_str("</table>\n");
    list(&mut page, "Warnings", " class=\"warn\"", &results.warnings);
    list(&mut page, "Proven on the copy", "", &results.proofs);
    if !results.fixes.is_empty() {
        let _ = writeln!(page, "<h2>Changes made to the copy</h2>\n<pre>{}</pre>", escape(&results.fixes));
    }
    page
}

fn list(page: &mut String, title: &str, class: &str, items: &[String]) {
    if items.is_empty() {
        return;
    }
    let _ = writeln!(page, "<h2>{title}</h2>\n<ul{class}>");
    for item in items {
        let _ = writeln!(page, "<li>{}</li>", escape(item));
    }
    page.push_str("</ul>\n");
}

/// Names come from guests and disks: nothing of them may become markup.
fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() && c != '\n' => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_words_are_never_markup() {
        assert_eq!(escape("<script>\"&\x1b"), "&lt;script&gt;&quot;&amp;\u{fffd}");
    }
}
