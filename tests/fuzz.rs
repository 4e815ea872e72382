//! Fuzzes every parser of bytes that others wrote (tests/fuzz_bodies), from the seeds in tests/corpus on.
//!
//! The quick tier replays the seeds and tries some thousand changes of them. `scripts/fuzz.sh` runs for as long as it
//! is told, in a build that counts which edges of the program an input takes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

#[path = "support/allocations.rs"]
mod allocations;
#[path = "fuzz_bodies/mod.rs"]
mod bodies;
#[path = "fuzz/coverage.rs"]
mod coverage;
#[path = "support/bounds.rs"]
mod bounds;
#[path = "fuzz/differential.rs"]
mod differential;
#[path = "support/images.rs"]
mod images;
#[path = "fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/run.rs"]
mod run;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bodies::BODIES;
use coverage::Coverage;
use differential::{READERS, Tally};
use images::seed;
use run::{Report, Until, corpus_dir, execute, name_of, run, seeds};

#[test]
fn a_page_that_is_cut_off_reads_as_zeroes_behind_its_end() {
    let whole = bodies::input::pack(&[7; 2 * bodies::input::PAGE]);
    for cut in 1..bodies::input::PAGE {
        let mut input = whole[..whole.len() - cut].to_vec();
        let view = bodies::input::View::new(&mut input);
        let bytes = view.get(bodies::input::PAGE as u64, bodies::input::PAGE);
        assert_eq!(bytes.iter().filter(|byte| **byte == 7).count(), bodies::input::PAGE - cut);
        assert_eq!(view.get(2 * bodies::input::PAGE as u64 - 1, 1), [0]);
    }
}

/// Writes what was found into the folder of findings and says so; how many there are.
fn findings(name: &str, report: &Report) -> usize {
    let dir = keep().unwrap_or_else(std::env::temp_dir).join("findings");
    for (what, input) in &report.findings {
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join(format!("{name}-{}", name_of(input)));
        std::fs::write(&path, input).unwrap();
        println!("finding: {name}: {} in {}", what.replace('\n', " "), path.display());
    }
    report.findings.len()
}

/// What decides the quick tests: always the same changes, or those of `HAUL_SEED`. New ground is the runner's.
fn quick_seed() -> u64 {
    std::env::var("HAUL_SEED").map_or(1, |text| text.parse().unwrap())
}

/// The same for images that haul and QEMU read differently.
fn differences(name: &str, tally: &Tally) -> usize {
    let dir = keep().unwrap_or_else(std::env::temp_dir).join("findings");
    for (how, input) in &tally.different {
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join(format!("{name}-qemu-{}", name_of(input)));
        std::fs::write(&path, input).unwrap();
        println!("finding: {name}: QEMU reads it differently: {how} in {}", path.display());
    }
    for (who, classes) in [("haul", &tally.haul_alone), ("QEMU", &tally.qemu_alone)] {
        for (why, count) in classes {
            println!("  {name}: {count} read by {who} alone: {why}");
        }
    }
    tally.different.len()
}

/// The folder that a run's inputs and findings are kept in.
fn keep() -> Option<PathBuf> {
    std::env::var_os("HAUL_FUZZ_DIR").map(PathBuf::from)
}

/// What comparing a format with QEMU is called.
fn differential_name(reader: &differential::Reader) -> String {
    format!("{}-qemu", reader.name)
}

#[test]
fn the_corpora_are_replayed() {
    for body in BODIES {
        let seeds = seeds(&corpus_dir(body.name));
        assert!(seeds.len() >= 3, "{} has {} seeds", body.name, seeds.len());
        for (name, bytes) in seeds {
            let outcome = execute(body, &bytes, &Coverage::new());
            let outcome = outcome.unwrap_or_else(|what| panic!("{}/{name}: {what}", body.name));
            let expected = name.split('-').next().unwrap();
            assert!(expected == "crash" || expected == outcome.word(), "{}/{name}: {outcome:?}", body.name);
        }
    }
}

#[test]
fn some_thousand_changes_are_errors_or_disks() {
    let seed = quick_seed();
    let mut found = 0;
    for body in BODIES {
        let report = run(body, seed, &Until::Executions(1500), None);
        println!(
            "{}: {} outcomes, {} of {} opened, {:.2} s",
            body.name,
            report.outcomes.len(),
            report.opened,
            report.executions,
            report.seconds
        );
        found += findings(body.name, &report);
        assert!(report.outcomes.len() >= 5, "{}: the changes miss their mark", body.name);
    }
    assert_eq!(found, 0, "HAUL_SEED={seed}");
}

#[test]
fn qemu_reads_changed_images_the_same() {
    let seed = quick_seed();
    let mut different = 0;
    for reader in &READERS {
        let tally = differential::run(reader, seed, &Until::Executions(100), None);
        println!(
            "{}: {} of {} read alike, {:.2} s",
            reader.name, tally.alike, tally.executions, tally.seconds
        );
        different += differences(reader.name, &tally);
        assert!(tally.alike > 10, "{}: the changes miss their mark", reader.name);
    }
    assert_eq!(different, 0, "HAUL_SEED={seed}");
}

#[test]
#[ignore = "long: HAUL_FUZZ_SECONDS of each parser, or of those named in HAUL_FUZZ_BODY; scripts/test.sh --long"]
fn fuzz_for_a_while() {
    let seconds = std::env::var("HAUL_FUZZ_SECONDS").map_or(20, |text| text.parse().unwrap());
    let until = Until::Worked(Duration::from_secs(seconds));
    let named = std::env::var("HAUL_FUZZ_BODY").unwrap_or_default();
    let named: Vec<&str> = named.split([',', ' ']).filter(|name| !name.is_empty()).collect();
    let all: Vec<String> = BODIES.iter().map(|body| body.name.to_owned()).collect();
    let all: Vec<String> = all.into_iter().chain(READERS.iter().map(differential_name)).collect();
    let unknown = named.iter().find(|name| !all.iter().any(|known| known == **name));
    assert_eq!(unknown, None, "the parsers are {all:?}");
    let is_wanted = |name: &str| named.is_empty() || named.contains(&name);
    let seed = seed();
    let mut found = 0;
    for body in BODIES.iter().filter(|body| is_wanted(body.name)) {
        let report = run(body, seed, &until, keep().as_deref());
        println!(
            "figure: {}: {} executions in {:.0} s, {} outcomes, {} edges, {} findings, seed {seed}",
            body.name,
            report.executions,
            report.seconds,
            report.outcomes.len(),
            report.edges,
            report.findings.len(),
        );
        found += findings(body.name, &report);
    }
    for reader in READERS.iter().filter(|reader| is_wanted(&differential_name(reader))) {
        let tally = differential::run(reader, seed, &until, keep().as_deref());
        let alone = |classes: &BTreeMap<String, u64>| classes.values().sum::<u64>();
        println!(
            "figure: {}: {} executions in {:.0} s, {} alike, {} by haul alone, {} by QEMU alone, {} by neither, \
             {} findings, seed {seed}",
            differential_name(reader),
            tally.executions,
            tally.seconds,
            tally.alike,
            alone(&tally.haul_alone),
            alone(&tally.qemu_alone),
            tally.neither,
            tally.different.len(),
        );
        found += differences(reader.name, &tally);
    }
    assert_eq!(found, 0, "findings of HAUL_SEED={seed}");
}
