//! The cloud: does it answer, what time does it have, and, asked with keys, does it take this system.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{Check, Host, Run, Severity, Subject, Verdict};
use crate::cloud::tencent::client::Skew;
use crate::cloud::tencent::cvm::Architecture;
use crate::cloud::tencent::sign::Method;
use crate::cloud::tencent::{Client, Endpoint, Settings, os};
use crate::cloud::{Credentials, SystemClock};
use crate::config::Cloud;
use crate::error::Result;
use crate::unit::Secret;
use crate::unit::bytes::human;

/// Signatures older or newer than so many seconds are refused (API 3.0, TC3-HMAC-SHA256).
const REFUSED: u64 = 300;
/// A clock this many seconds off is not kept by anyone.
const DOUBTED: u64 = 30;
/// Bytes sent to a bucket on trial.
const TRIAL: usize = 8 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

pub const CHECKS: &[Check] = &[
    Check { id: "cloud.os", title: "the cloud imports this system", run: Run::Disk(system) },
    Check { id: "cloud.cvm", title: "the CVM API answers", run: Run::Host(cvm) },
    Check { id: "cloud.cos", title: "the object store answers", run: Run::Host(cos) },
    Check { id: "cloud.bucket", title: "the bucket takes what is sent", run: Run::Host(bucket) },
    Check { id: "cloud.clock", title: "this machine's clock is right", run: Run::Host(clock) },
];

/// The cloud, if the user said where it is: nobody is asked unbidden.
fn configured<'a>(host: &Host<'a>) -> Option<&'a Cloud> {
    host.options.cloud.as_ref().filter(|cloud| cloud.is_named())
}

/// What the system would be declared as. On a machine that the cloud does not have, `guest.root` tells.
fn system(subject: &Subject<'_>) -> Option<Verdict> {
    let (cvm, guest) = (subject.options.cvm.as_ref()?, subject.guest.as_ref().ok()?);
    let arch = Architecture::of_guest(guest.arch)?;
    let supported = match cvm.supported_os() {
        Ok(supported) => supported,
        Err(error) => return Some(Verdict::of_error(Severity::Warn, &error)),
    };
    Some(match os::choose(&guest.os.id, &guest.os.version, arch, &supported) {
        Ok(choice) => Verdict::pass(format!("as {choice}, for {}", arch.name())),
        Err(error) => Verdict::of_error(Severity::Fail, &error),
    })
}

/// Sends part of an upload that is then dropped: how fast, and that the keys may.
fn bucket(host: &Host<'_>) -> Option<Verdict> {
    let store = &host.options.bucket.as_ref()?.0;
    let send = || {
        let upload = store.begin(&format!("haul-check-{}", uuid::Uuid::new_v4()))?;
        let began = Instant::now();
        let sent = store.put_part(&upload, 1, Bytes::from(vec![0; TRIAL]).into());
        let time = began.elapsed();
        let dropped = store.abort(&upload);
        sent?;
        dropped.map(|()| time)
    };
    Some(match send() {
        Ok(time) => {
            let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(1);
            let rate = TRIAL as u64 * 1_000_000 / micros;
            let minutes = host.used / (rate * 60).max(1) + 1;
            Verdict::pass(format!(
                "{} a second to {}: the {} in use would take about {minutes} min, less when compressed",
                human(rate),
                store.name(""),
                human(host.used)
            ))
        }
        Err(error) => Verdict::of_error(Severity::Fail, &error),
    })
}

/// A client that signs nothing.
fn client(endpoint: Endpoint) -> Result<Client> {
    let nobody =
        Credentials { secret_id: String::new(), secret_key: Secret::new(String::new()), token: None };
    let settings = Settings {
        endpoint,
        service: String::new(),
        version: String::new(),
        region: String::new(),
        method: Method::Tc3,
    };
    Client::new(settings, Arc::new(move || Ok(nobody.clone())), Arc::new(SystemClock::new()))
}

/// Asks the CVM API once for both checks.
fn asked<'h>(host: &'h Host<'_>) -> Option<&'h Result<Option<Skew>>> {
    let ask = || {
        let cloud = configured(host)?;
        let endpoint = Endpoint::of("cvm", cloud.cvm_endpoint.as_deref());
        Some(endpoint.and_then(|endpoint| client(endpoint)?.skew()))
    };
    host.cvm.get_or_init(ask).as_ref()
}

fn cvm(host: &Host<'_>) -> Option<Verdict> {
    let endpoint = configured(host)?.cvm_endpoint.clone();
    let endpoint = endpoint.unwrap_or_else(|| "the public cloud's API".into());
    Some(match asked(host)? {
        Ok(_) => Verdict::pass(format!("{endpoint} answers")),
        Err(error) => Verdict::of_error(Severity::Fail, error),
    })
}

fn clock(host: &Host<'_>) -> Option<Verdict> {
    let skew = asked(host)?.as_ref().ok()?.as_ref()?;
    let evidence = format!("it is {skew}");
    let remedy = "set it: chronyc makestep, ntpdate or timedatectl set-ntp true";
    Some(match skew.seconds.unsigned_abs() {
        // A second either way is the answer's own age.
        0..=1 => Verdict::pass("it agrees with the server's"),
        2..=DOUBTED => Verdict::pass(evidence),
        seconds if seconds < REFUSED => Verdict::warn(evidence, remedy),
        _ => Verdict::fail(
            format!("{evidence}; the cloud refuses signatures more than {REFUSED} s off"),
            remedy,
        ),
    })
}

fn cos(host: &Host<'_>) -> Option<Verdict> {
    let cloud = configured(host)?;
    let text = match (&cloud.cos_endpoint, &cloud.region) {
        (Some(url), _) => url.clone(),
        (None, Some(region)) => format!("https://cos.{region}.myqcloud.com"),
        (None, None) => return None,
    };
    let answer = match cloud.connect_to {
        None => Endpoint::of("cos", Some(&text)).and_then(|endpoint| client(endpoint)?.skew()).map(drop),
        Some(address) => {
            let port = url::Url::parse(&text).ok().and_then(|url| url.port_or_known_default()).unwrap_or(443);
            let address = SocketAddr::new(address, port);
            if let Err(error) = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                let what = format!("cannot reach {text} at {address}: {error}");
                return Some(Verdict::fail(what, "check the endpoint, --connect-to and the network"));
            }
            Ok(())
        }
    };
    Some(match answer {
        Ok(()) => Verdict::pass(format!("{text} answers")),
        Err(error) => Verdict::of_error(Severity::Fail, &error),
    })
}
