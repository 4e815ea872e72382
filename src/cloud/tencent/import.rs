//! The import of an image: looked up before it is made, never made twice, waited for to its end.

use std::time::Duration;

use super::client::outcome_unknown;
use super::cvm::{Cvm, Image, ImportRequest};
use crate::error::{Error, Kind, Result, Retry};
use crate::monitor::{Level, Monitor};
use crate::unit::Secret;

/// How often a try of ImportImage with an unknown outcome is followed by another.
const TRIES: usize = 3;
/// How often the new image is looked for before a try counts as not carried out.
const LOOKS: usize = 3;
/// How many polls an image may take to appear.
const POLLS_TO_APPEAR: usize = 20;

/// How long an import is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// The pause between polls; 5–30 s on a real cloud.
    pub interval: Duration,
    /// The longest wait; imports take minutes to an hour.
    pub timeout: Duration,
}

impl Default for Waiting {
    fn default() -> Self {
        Waiting { interval: Duration::from_secs(10), timeout: Duration::from_secs(4 * 3600) }
    }
}

/// Makes links to the object. Each is good for one fetch, so every request gets its own and none is ever probed.
pub type FreshUrl<'a> = &'a mut dyn FnMut() -> Result<Secret<String>>;

/// Lets the cloud check the request without making anything.
///
/// Fails when the name is taken, unless by an image this same request made earlier.
pub fn rehearse(cvm: &Cvm, request: &ImportRequest, url: FreshUrl<'_>) -> Result<()> {
    if made_earlier(cvm, request)?.is_some() {
        return Ok(());
    }
    cvm.import_image(request, &url()?, true).map(drop)
}

/// Starts the import; the image's id.
///
/// An image of the request's name *and* description is one that an earlier run or try started: its id is given and
/// nothing is made. When the outcome of a try is unknown, the image is looked up before it is asked for again.
pub fn start(cvm: &Cvm, request: &ImportRequest, waiting: Waiting, url: FreshUrl<'_>) -> Result<String> {
    if let Some(image) = made_earlier(cvm, request)? {
        return Ok(image.image_id);
    }
    let mut last = None;
    for _ in 0..TRIES {
        match cvm.import_image(request, &url()?, false) {
            Ok(Some(id)) => return Ok(id),
            // Older clouds do not name the image they make.
            Ok(None) => {}
            Err(error) if outcome_unknown(&error) => last = Some(error),
            Err(error) => return Err(error),
        }
        for _ in 0..LOOKS {
            cvm.client().clock().sleep(waiting.interval)?;
            if let Some(image) = made_earlier(cvm, request)? {
                return Ok(image.image_id);
            }
        }
        if last.is_none() {
            break;
        }
    }
    Err(last.unwrap_or_else(|| {
        Error::new(
            Kind::Cloud,
            "cloud.import-lost",
            format!("ImportImage was accepted, but no image named {} appeared", request.name),
        )
        .remedy("look at the image list in the console")
    }))
}

/// Waits until the image can be used.
pub fn wait(cvm: &Cvm, id: &str, waiting: Waiting, monitor: &dyn Monitor) -> Result<Image> {
    let clock = cvm.client().clock();
    let start = clock.elapsed();
    let (mut seen, mut polls, mut silent) = (false, 0, false);
    loop {
        match cvm.image(id) {
            Ok(Some(image)) => match image.image_state.as_str() {
                "NORMAL" => return Ok(image),
                "IMPORTFAILED" | "CREATEFAILED" => return Err(failed(id, &image.image_state)),
                _ => seen = true,
            },
            Ok(None) if seen => return Err(failed(id, "vanished")),
            Ok(None) if polls >= POLLS_TO_APPEAR => return Err(failed(id, "never appeared")),
            Ok(None) => polls += 1,
            // The import goes on without us: a network that is away for an hour costs nothing but knowledge.
            Err(error) if error.retry() == Retry::Yes => {
                if !silent {
                    monitor.note(Level::Info, &format!("still waiting for image {id}: {error}"));
                }
                silent = true;
            }
            Err(error) => return Err(error),
        }
        if clock.elapsed().saturating_sub(start) >= waiting.timeout {
            return Err(Error::new(
                Kind::Cloud,
                "cloud.import-timeout",
                format!("image {id} was not ready after {} s", waiting.timeout.as_secs()),
            )
            .remedy("look at the image in the console; run again with --resume to go on waiting")
            .fact("image_id", id));
        }
        clock.sleep(waiting.interval)?;
    }
}

/// The image this very request made earlier. An error when the name belongs to another image.
fn made_earlier(cvm: &Cvm, request: &ImportRequest) -> Result<Option<Image>> {
    match cvm.image_by_name(&request.name)? {
        Some(image) if image.image_description != request.description => Err(Error::new(
            Kind::Cloud,
            "cloud.name-taken",
            format!("the account already has an image named {}", request.name),
        )
        .because(format!("{} was not made by this job", image.image_id))
        .remedy("choose another name with --image-name, or delete that image")
        .fact("image_id", image.image_id)),
        found => Ok(found),
    }
}

fn failed(id: &str, state: &str) -> Error {
    Error::new(Kind::Cloud, "cloud.import-failed", format!("the cloud could not import image {id} ({state})"))
        .because("the cloud gives the reason only as a message to the account (console, message centre)")
        .remedy(
            "look there for InvalidUrl, InvalidFormatSize, VirtioNotInstall, PartitionNotPresent, \
             RootPartitionNotFound, CloudInitNotInstalled or InternalError; `haul check` on the source finds most \
             of their causes",
        )
        .fact("image_id", id)
        .fact("state", state)
}
