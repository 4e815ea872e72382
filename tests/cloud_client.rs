//! The cloud client against the lab and against servers that misbehave.

#![cfg(feature = "net")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]

#[path = "support/cloud.rs"]
mod support;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use haul::cloud::Credentials;
use haul::cloud::tencent::client::{Repeat, api_code, outcome_unknown};
use haul::cloud::tencent::cvm::{Architecture, BootMode, RunRequest};
use haul::cloud::tencent::import::Waiting;
use haul::cloud::tencent::sign::Method;
use haul::cloud::tencent::{Edition, import, os};
use haul::error::{Error, Kind, Retry};
use haul::lab::cvm::{Injected, Shapes, generate_keys};
use haul::monitor::Tally;
use haul::unit::Secret;
use serde_json::json;

use support::disk::{self, Server};
use support::{Lab, OneObject, TestClock, WAITING, cvm_at, cvm_signing, rehearse, request, start};

fn blank() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

#[test]
fn every_signature_passes_the_gate_and_none_under_a_wrong_key() {
    let lab = Lab::start(|_| {});
    for method in [Method::Tc3, Method::HmacSha256, Method::HmacSha1] {
        let url = lab.handle.url();
        let cvm = |keys| cvm_signing(&url, keys, Edition::Public, TestClock::right(), method);
        let link = Secret::new("http://127.0.0.1:1/a b?c=d&e=ü".to_owned());
        cvm(lab.keys.clone()).import_image(&request("any"), &link, true).unwrap();
        assert_eq!(cvm(lab.keys.clone()).image_by_name("none").unwrap(), None);
        let wrong = Credentials { secret_key: Secret::new("canary".into()), ..lab.keys.clone() };
        let error = cvm(wrong).image_quota().unwrap_err();
        assert_eq!(
            (error.kind(), api_code(&error)),
            (Kind::Credentials, Some("AuthFailure.SignatureFailure"))
        );
        assert!(error.facts().iter().any(|(name, value)| *name == "request_id" && value.len() == 36));
        let error = cvm(generate_keys()).image_quota().unwrap_err();
        assert_eq!(api_code(&error), Some("AuthFailure.SecretIdNotFound"));
        assert_eq!(error.kind().exit_code(), 9);
    }
}

#[test]
fn a_session_token_must_be_the_keys_own() {
    let mut keys = generate_keys();
    keys.token = Some(Secret::new("token-1".into()));
    let lab = Lab::start(|config| config.keys = vec![keys.clone()]);
    let with = |token: Option<&str>| {
        let keys = Credentials { token: token.map(|t| Secret::new(t.into())), ..keys.clone() };
        cvm_at(&lab.handle.url(), keys, Edition::Public, TestClock::right()).image_quota()
    };
    with(Some("token-1")).unwrap();
    for wrong in [None, Some("token-2")] {
        assert_eq!(api_code(&with(wrong).unwrap_err()), Some("AuthFailure.TokenFailure"));
    }
}

#[test]
fn a_skewed_clock_is_told_by_how_much_and_which_way() {
    let lab = Lab::start(|_| {});
    for (offset, way) in [(-1000, "behind"), (1000, "ahead of")] {
        for method in [Method::Tc3, Method::HmacSha1] {
            let clock = TestClock::wrong_by(offset);
            let cvm =
                cvm_signing(&lab.handle.url(), lab.keys.clone(), Edition::Public, clock.clone(), method);
            let error = cvm.image_quota().unwrap_err();
            assert_eq!((error.kind(), error.id()), (Kind::Credentials, "cloud.clock"));
            assert!(error.why().contains(way), "{}", error.why());
            let (_, seconds) = error.facts().iter().find(|(name, _)| *name == "skew_seconds").unwrap();
            assert!((seconds.parse::<i64>().unwrap() - offset).abs() <= 5, "{seconds}");
            assert!(clock.pauses.lock().unwrap().is_empty(), "a wrong clock does not pass by waiting");
        }
    }
    let cvm = cvm_at(&lab.handle.url(), lab.keys.clone(), Edition::Public, TestClock::wrong_by(200));
    cvm.image_quota().unwrap();
    let skew = cvm.client().skew().unwrap().unwrap().seconds;
    assert!((195..=205).contains(&skew), "{skew}");
}

#[test]
fn a_v1_request_is_taken_once() {
    use haul::cloud::tencent::sign::{v1_signature, v1_string};
    let lab = Lab::start(|_| {});
    let host = lab.handle.addr().to_string();
    let now = haul::cloud::Clock::unix(&*TestClock::right()).to_string();
    let mut fields: std::collections::BTreeMap<String, String> = [
        ("Action", "DescribeImageQuota"),
        ("Version", "2017-03-12"),
        ("Region", "ap-guangzhou"),
        ("Nonce", "7"),
        ("Timestamp", &now),
        ("SecretId", &lab.keys.secret_id),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    let string = v1_string("GET", &host, "/", &fields);
    fields.insert("Signature".into(), v1_signature(false, lab.keys.secret_key.expose(), &string));
    let query = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(&fields).finish();
    let send = || {
        let mut stream = std::net::TcpStream::connect(lab.handle.addr()).unwrap();
        write!(stream, "GET /?{query} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(send().contains("ImageNumQuota"));
    assert!(send().contains("a replay"));
}

#[test]
fn passing_faults_of_a_read_are_waited_out_with_growing_pauses() {
    let lab = Lab::start(|_| {});
    let clock = TestClock::right();
    let cvm = cvm_at(&lab.handle.url(), lab.keys.clone(), Edition::Public, clock.clone());
    use Injected::{BadGateway, InternalError, LostAnswer, RateLimit};
    lab.handle.inject("DescribeImageQuota", [RateLimit, InternalError, BadGateway, LostAnswer]);
    assert_eq!(cvm.image_quota().unwrap(), Some(50));
    assert_eq!(*clock.pauses.lock().unwrap(), [1, 2, 4, 8].map(Duration::from_secs));
    lab.handle.inject("DescribeImageQuota", [BadGateway; 5]);
    let error = cvm.image_quota().unwrap_err();
    assert_eq!((error.kind(), error.retry()), (Kind::Network, Retry::Yes));
    assert!(error.why().contains("502"), "{}", error.why());
}

#[test]
fn a_create_is_repeated_only_when_it_was_refused_and_a_purchase_never() {
    let lab = Lab::start(|_| {});
    let (cvm, link) = (lab.cvm(), Secret::new("http://127.0.0.1:1/x".to_owned()));
    lab.handle.inject("ImportImage", [Injected::RateLimit]);
    cvm.import_image(&request("one"), &link, false).unwrap();
    for fault in [Injected::InternalError, Injected::BadGateway, Injected::LostAnswer] {
        lab.handle.inject("ImportImage", [fault]);
        let error = cvm.import_image(&request("two"), &link, false).unwrap_err();
        assert!(outcome_unknown(&error), "{fault:?}: {error:?}");
    }
    lab.handle.inject("RunInstances", [Injected::RateLimit]);
    let run = RunRequest { zone: "ap-guangzhou-6".into(), image_id: "img-1".into(), ..RunRequest::default() };
    assert_eq!(api_code(&cvm.run_instance(&run).unwrap_err()), Some("RequestLimitExceeded"));
}

#[test]
fn an_import_whose_answer_is_lost_is_looked_up_and_not_repeated() {
    let (lab, folder) = (Lab::start(|_| {}), tempfile::tempdir().unwrap());
    let store = OneObject::serve(&disk::raw(folder.path(), Server::WHOLE));
    let cvm = lab.cvm();
    lab.handle.inject("ImportImage", [Injected::LostAnswer]);
    let id = start(&cvm, &request("lost"), &store).unwrap();
    assert_eq!(store.counts().0, 1, "a second request was made");
    import::wait(&cvm, &id, WAITING, &Tally::default()).unwrap();
    // What a job does that was killed before it noted the id.
    let again = start(&cvm, &request("lost"), &store).unwrap();
    assert_eq!((again, store.counts()), (id, (1, 1)));
}

#[test]
fn an_import_that_was_not_carried_out_is_asked_for_again_with_a_fresh_link() {
    let (lab, folder) = (Lab::start(|_| {}), tempfile::tempdir().unwrap());
    let store = OneObject::serve(&disk::raw(folder.path(), Server::WHOLE));
    let cvm = lab.cvm();
    lab.handle.inject("ImportImage", [Injected::BadGateway, Injected::InternalError]);
    let id = start(&cvm, &request("retry"), &store).unwrap();
    assert_eq!(store.counts().0, 3);
    assert_eq!(import::wait(&cvm, &id, WAITING, &Tally::default()).unwrap().image_state, "NORMAL");
}

#[test]
fn a_name_no_edition_takes_is_refused_here() {
    let cvm = cvm_at("http://127.0.0.1:1", generate_keys(), Edition::Public, TestClock::right());
    for name in [String::new(), "ü".repeat(61)] {
        let link = Secret::new("http://127.0.0.1:1/x".to_owned());
        let error = cvm.import_image(&request(&name), &link, true).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
    }
}

#[test]
fn a_name_of_somebody_elses_image_is_refused_before_anything_is_made() {
    let lab = Lab::start(|_| {});
    let (cvm, object) = (lab.cvm(), blank());
    let store = OneObject::serve(object.path());
    start(&cvm, &request("taken"), &store).unwrap();
    let mut other = request("taken");
    other.description = "another job".into();
    for error in [rehearse(&cvm, &other, &store).unwrap_err(), start(&cvm, &other, &store).unwrap_err()] {
        assert_eq!((error.kind(), error.id()), (Kind::Cloud, "cloud.name-taken"));
    }
    assert_eq!(store.counts().0, 1);
}

#[test]
fn a_rehearsal_finds_what_the_cloud_would_refuse_and_makes_nothing() {
    for edition in [Edition::Public, Edition::Tce] {
        let lab = Lab::start(|config| config.edition = edition);
        let cvm = cvm_at(&lab.handle.url(), lab.keys.clone(), edition, TestClock::right());
        let object = blank();
        let store = OneObject::serve(object.path());
        rehearse(&cvm, &request("ok"), &store).unwrap();
        let mut unknown = request("ok");
        unknown.os.os_version = "12".into();
        let error = rehearse(&cvm, &unknown, &store).unwrap_err();
        assert_eq!(api_code(&error), Some("InvalidImageOsVersion.Unsupported"));
        assert_eq!(store.counts(), (2, 0));
        assert_eq!(cvm.image_by_name("ok").unwrap(), None);
    }
}

#[test]
fn a_failed_import_says_where_the_reason_is_and_not_what_it_is() {
    let lab = Lab::start(|_| {});
    let (cvm, object) = (lab.cvm(), blank());
    let store = OneObject::serve(object.path());
    let id = start(&cvm, &request("blank"), &store).unwrap();
    let error = import::wait(&cvm, &id, WAITING, &Tally::default()).unwrap_err();
    assert_eq!((error.kind(), error.id()), (Kind::Cloud, "cloud.import-failed"));
    assert!(error.what().contains(&id) && error.what_to_do().contains("InvalidUrl"));
}

#[test]
fn an_image_that_vanishes_has_failed() {
    let lab = Lab::start(|config| config.failed_images_vanish = true);
    let (cvm, object) = (lab.cvm(), blank());
    let store = OneObject::serve(object.path());
    let id = start(&cvm, &request("gone"), &store).unwrap();
    let error = import::wait(&cvm, &id, WAITING, &Tally::default()).unwrap_err();
    assert_eq!(error.id(), "cloud.import-failed");
}

#[test]
fn waiting_ends_at_its_limit() {
    let lab = Lab::start(|_| {});
    let cvm = lab.cvm();
    // A store that never answers keeps the image IMPORTING.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let link = Secret::new(format!("http://{}/x", silent.local_addr().unwrap()));
    let id = cvm.import_image(&request("slow"), &link, false).unwrap().unwrap();
    let short = Waiting { timeout: Duration::from_secs(1), ..WAITING };
    let error = import::wait(&cvm, &id, short, &Tally::default()).unwrap_err();
    assert_eq!((error.kind(), error.id()), (Kind::Cloud, "cloud.import-timeout"));
}

#[test]
fn waiting_outlives_a_network_that_is_away() {
    let (lab, folder) = (Lab::start(|_| {}), tempfile::tempdir().unwrap());
    let store = OneObject::serve(&disk::raw(folder.path(), Server::WHOLE));
    let (cvm, tally) = (lab.cvm(), Tally::default());
    let id = start(&cvm, &request("away"), &store).unwrap();
    lab.handle.inject("DescribeImages", [Injected::BadGateway; 12]);
    import::wait(&cvm, &id, WAITING, &tally).unwrap();
    assert_eq!(tally.notes().len(), 1);
}

#[test]
fn both_editions_are_understood_in_old_and_new_shapes() {
    for (edition, shapes) in [
        (Edition::Public, Shapes::New),
        (Edition::Public, Shapes::Old),
        (Edition::Tce, Shapes::New),
        (Edition::Tce, Shapes::Old),
    ] {
        let lab = Lab::start(|config| {
            config.edition = edition;
            config.shapes = shapes;
        });
        let cvm = cvm_at(&lab.handle.url(), lab.keys.clone(), edition, TestClock::right());
        let supported = cvm.supported_os().unwrap();
        assert!(supported.linux.contains(&"Debian".into()) && supported.windows == ["Windows"]);
        let debian =
            |version| os::choose("debian", version, Architecture::X86_64, &supported).unwrap().to_string();
        assert_eq!(debian("10"), "Debian 10");
        if (edition, shapes) != (Edition::Tce, Shapes::Old) {
            assert_eq!(debian("12"), "Other Linux 8");
        }
        let object = blank();
        let store = OneObject::serve(object.path());
        // Old public clouds do not name the image: it is found by its name.
        let id = start(&cvm, &request("x"), &store).unwrap();
        assert_eq!(cvm.image(&id).unwrap().unwrap().image_name, "x");
        let mut uefi = request("uefi");
        uefi.boot_mode = BootMode::Uefi;
        let rehearsed = rehearse(&cvm, &uefi, &store);
        match edition {
            Edition::Public => rehearsed.unwrap(),
            Edition::Tce => assert_eq!(rehearsed.unwrap_err().id(), "cloud.uefi"),
        }
    }
}

/// Answers every request with the same bytes, and counts them.
fn canned(answer: &'static str) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (url, count) = (format!("http://{}", listener.local_addr().unwrap()), Arc::new(AtomicUsize::new(0)));
    let counted = count.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            counted.fetch_add(1, Ordering::SeqCst);
            let mut request = Vec::new();
            let mut piece = [0; 4096];
            // The client's requests here all end with an empty JSON object.
            while !request.ends_with(b"{}") {
                match stream.read(&mut piece) {
                    Ok(0) | Err(_) => break,
                    Ok(n) => request.extend_from_slice(&piece[..n]),
                }
            }
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    (url, count)
}

fn told_by(answer: &'static str) -> (Error, usize) {
    let (url, count) = canned(answer);
    let cvm = cvm_at(&url, generate_keys(), Edition::Public, TestClock::right());
    let error = cvm.client().call("DescribeImageQuota", &json!({}), Repeat::Freely).unwrap_err();
    (error, count.load(Ordering::SeqCst))
}

#[test]
fn a_redirect_is_never_followed_nor_repeated() {
    let (error, sent) =
        told_by("HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n");
    assert_eq!((error.id(), sent), ("cloud.endpoint", 1));
}

#[test]
fn unreadable_answers_are_network_faults() {
    let (error, sent) = told_by("HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello");
    assert_eq!((error.kind(), error.id(), sent), (Kind::Network, "cloud.unanswered", 5));
    let (error, _) = told_by("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}");
    assert!(error.why().contains("Response"), "{}", error.why());
    let (error, _) = told_by("HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\nconnection: close\r\n\r\nx");
    assert_eq!(error.id(), "cloud.unanswered");
}

#[test]
fn nobody_listening_is_told_with_the_endpoint() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{free}");
    let error = cvm_at(&url, generate_keys(), Edition::Public, TestClock::right()).image_quota().unwrap_err();
    assert_eq!((error.kind(), error.id()), (Kind::Network, "cloud.connect"));
    assert!(error.what().contains(&url) && !outcome_unknown(&error));
}

#[test]
fn keys_and_links_in_a_servers_message_go_no_further() {
    let (url, _) = canned(concat!(
        "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n",
        r#"{"Response":{"Error":{"Code":"InvalidParameter.UrlError","Message":"bad: canary-key"},"RequestId":"r"}}"#
    ));
    let keys = Credentials { secret_key: Secret::new("canary-key".into()), ..generate_keys() };
    let cvm = cvm_at(&url, keys, Edition::Public, TestClock::right());
    let error = cvm.image_quota().unwrap_err();
    assert!(!format!("{error:?} {error} {}", error.why()).contains("canary"), "{error:?}");
    assert!(error.why().contains("bad: [secret]"));
}

#[test]
fn odd_field_types_are_forgiven() {
    let (url, _) = canned(concat!(
        "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n",
        r#"{"Response":{"TotalCount":true,"New":1,"ImportImageOsListSupported":{"LINUX":["Debian",7],"windows":null},"#,
        r#""ImportImageOsVersionSet":[{"OsName":null,"OsVersions":"x"},3],"RequestId":null}}"#
    ));
    let cvm = cvm_at(&url, generate_keys(), Edition::Public, TestClock::right());
    let supported = cvm.supported_os().unwrap();
    assert_eq!((supported.linux, supported.windows), (vec!["Debian".to_owned()], vec![]));
    assert_eq!(supported.details.len(), 2);
}

#[test]
fn an_instance_role_gives_temporary_keys() {
    let url = metadata();
    let clock = TestClock::right();
    let source = haul::cloud::credentials::role_source(&url, clock.clone());
    let ids = || source().unwrap().secret_id;
    assert_eq!((ids(), ids()), ("AKIDrole1".into(), "AKIDrole1".into()), "asked for again at once");
    haul::cloud::Clock::sleep(&*clock, Duration::from_secs(301)).unwrap();
    assert_eq!(ids(), "AKIDrole2", "kept for ever");
    let keys = source().unwrap();
    assert_eq!(keys.token.unwrap().expose(), "token-role");
    let nobody = haul::cloud::credentials::instance_role("http://127.0.0.1:1").unwrap_err();
    assert_eq!(nobody.kind(), Kind::Credentials);
}

/// The metadata service's two pages.
fn metadata() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let mut given = 0;
        for mut stream in listener.incoming().flatten() {
            let mut piece = [0; 4096];
            let n = stream.read(&mut piece).unwrap_or(0);
            let line = String::from_utf8_lossy(&piece[..n]).lines().next().unwrap_or_default().to_owned();
            let body = if line.contains("/security-credentials/ ") {
                "CVMRole".to_owned()
            } else if line.contains("/security-credentials/CVMRole ") {
                given += 1;
                format!(r#"{{"TmpSecretId":"AKIDrole{given}","TmpSecretKey":"key","Token":"token-role"}}"#)
            } else {
                String::new()
            };
            let length = body.len();
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            );
        }
    });
    url
}
