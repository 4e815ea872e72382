//! The importer: fetches the link once, has the object judged, boots it, and tells only the account why it failed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use url::{Host, Url};

use super::Lab;
use super::hypervisor::Machine;
use super::judge::{Code, Judge, Passed, Rules, SIZE_LIMIT, Verdict};
use super::world::ImageState;
use crate::boot::config_drive::ConfigDrive;
use crate::cloud::tencent::Edition;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence of the store.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Starts the import of the image `id` beside its caller.
pub(super) fn spawn(lab: &Arc<Lab>, id: &str, url: String, force: bool) {
    let (lab, id) = (lab.clone(), id.to_owned());
    tokio::spawn(async move {
        let outcome = import(&lab, &id, &url, force).await;
        settle(&lab, &id, outcome);
    });
}

async fn import(lab: &Arc<Lab>, id: &str, url: &str, force: bool) -> Result<Passed, Verdict> {
    // One at a time: judging and booting take the whole machine.
    let _turn = lab.turn.acquire().await;
    let folder = lab.folder(id);
    std::fs::create_dir_all(&folder).map_err(|error| {
        Verdict::new(Code::InternalError, format!("cannot make {}: {error}", folder.display()))
    })?;
    fetch(lab, url, &folder.join("object")).await.map_err(|why| Verdict::new(Code::InvalidUrl, why))?;
    let (lab, id) = (lab.clone(), id.to_owned());
    let judged = tokio::task::spawn_blocking(move || judge_and_boot(&lab, &id, force)).await;
    judged.unwrap_or_else(|error| Err(Verdict::new(Code::InternalError, error.to_string())))
}

fn judge_and_boot(lab: &Lab, id: &str, force: bool) -> Result<Passed, Verdict> {
    let folder = lab.folder(id);
    let rules = Rules { force, new_qcow2: lab.config.new_qcow2, gpt: lab.config.edition == Edition::Public };
    let passed = Judge::new(&lab.config.programs, &folder).judge(rules)?;
    let uefi = lab.world().images.get(id).is_some_and(|image| image.uefi);
    if let Some(hypervisor) = &lab.config.hypervisor {
        let machine = Machine {
            id: id.to_owned(),
            disk: passed.raw.clone(),
            uefi,
            config_drive: ConfigDrive { instance_id: id.to_owned(), ..ConfigDrive::default() },
            console: folder.join("console.log"),
        };
        hypervisor
            .prove(&machine)
            .map_err(|error| Verdict::new(Code::InternalError, format!("{error:?}")))?;
    }
    Ok(passed)
}

/// One GET, without a range, of a link that no import was given before.
async fn fetch(lab: &Lab, url: &str, to: &Path) -> Result<(), String> {
    let parsed = Url::parse(url).map_err(|error| error.to_string())?;
    let authority = match (parsed.host_str(), parsed.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => return Err("the link names no host".into()),
    };
    if !is_cos(&parsed, &authority, lab.config.cos.as_deref()) {
        return Err(format!("{authority} is not the object store of this region"));
    }
    if !lab.world().used_urls.insert(url.to_owned()) {
        return Err("the link was used before".into());
    }
    let client = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .no_proxy()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT);
    let client = match parsed.host() {
        // The lab never fetches from anywhere else.
        Some(Host::Domain(name)) => client.resolve(name, ([127, 0, 0, 1], 0).into()),
        _ => client,
    };
    let client = client.build().map_err(|error| error.to_string())?;
    let told = |error: reqwest::Error| format!("the link cannot be read: {:?}", error.without_url());
    let mut answer = client.get(parsed).send().await.map_err(told)?;
    if !answer.status().is_success() {
        return Err(format!("the store answered HTTP {}", answer.status()));
    }
    let spooled = |error: std::io::Error| format!("cannot spool the object: {error}");
    let mut file = tokio::fs::File::create(to).await.map_err(spooled)?;
    let mut total = 0u64;
    while let Some(piece) = answer.chunk().await.map_err(told)? {
        total = total.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
        if total > SIZE_LIMIT {
            return Err(format!("the object is larger than {SIZE_LIMIT} bytes"));
        }
        file.write_all(&piece).await.map_err(spooled)?;
    }
    file.flush().await.map_err(spooled)
}

/// Whether a link leads to the object store `cos`, or, when none is named, to this machine. Whatever it says, names
/// are resolved to this machine and addresses must be its own.
fn is_cos(url: &Url, authority: &str, cos: Option<&str>) -> bool {
    let local = match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => cos.is_some() || name == "localhost" || name.ends_with(".localhost"),
        None => false,
    };
    local && cos.is_none_or(|cos| authority == cos || authority.ends_with(&format!(".{cos}")))
}

/// Ends an import: the state is all the API shows; the code goes to the account, the reason to the lab's log.
fn settle(lab: &Lab, id: &str, outcome: Result<Passed, Verdict>) {
    let folder = lab.folder(id);
    // What was fetched is of no further use; an image that failed keeps only its console log.
    let _ = std::fs::remove_file(folder.join("object"));
    let _ = std::fs::remove_file(folder.join("initramfs"));
    let mut world = lab.world();
    let Some(image) = world.images.get_mut(id) else { return };
    match outcome {
        Ok(passed) => {
            image.state = ImageState::Normal;
            image.size = passed.size;
            image.disk = passed.raw;
            tracing::info!(image = id, "imported");
        }
        Err(Verdict { code, why }) => {
            let _ = std::fs::remove_file(folder.join("disk.raw"));
            image.state = ImageState::Failed;
            let name = image.name.clone();
            tracing::warn!(image = id, %code, why, "import failed");
            world.notify(id, &name, &code.to_string(), &why);
            if lab.config.failed_images_vanish {
                world.images.remove(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_to_the_store_named_or_to_this_machine() {
        let cos = |url: &str, cos: Option<&str>| {
            let url = Url::parse(url).unwrap();
            let authority = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
            is_cos(&url, &authority, cos)
        };
        let store = Some("cos.lab:90");
        assert!(cos("http://bkt-1.cos.lab:90/x", store) && cos("http://cos.lab:90/bkt-1/x", store));
        assert!(!cos("http://bkt-1.cos.lab:91/x", store) && !cos("http://othercos.lab:90/x", store));
        assert!(!cos("http://10.0.0.1:90/x", Some("10.0.0.1:90")), "the lab left this machine");
        assert!(cos("http://127.0.0.1:90/x", None) && cos("http://b.cos.localhost:90/x", None));
        assert!(!cos("http://example.com:90/x", None));
    }
}
