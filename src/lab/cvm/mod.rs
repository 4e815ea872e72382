//! CVM's API on loopback: images that are judged and booted before they are NORMAL, instances that really run.
//!
//! Beside the API there are pages of the lab's own, which the real cloud does not have and `migrate` must not read:
//! `GET /lab/notifications`, `GET /lab/instances/ID/console`.

mod gate;
pub mod hypervisor;
mod images;
mod importer;
mod instances;
pub mod judge;
mod schema;
mod world;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::header::{CONTENT_TYPE, DATE};
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{any, get};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::format_description;
use tokio::sync::Semaphore;

use crate::cloud::tencent::Edition;
use crate::cloud::{Clock, Credentials, SystemClock};
use crate::error::{Error, Kind, Result};
use crate::host::programs::Programs;
use crate::net;
use crate::unit::Secret;
use gate::{Call, Fault, Gate, Incoming};
use hypervisor::Hypervisor;
use world::{InstanceState, World};

/// Longest request, as documented for JSON.
const BODY_LIMIT: usize = 10 << 20;

/// Which of an edition's documented response shapes is spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Shapes {
    /// The present ones.
    #[default]
    New,
    /// Older ones: ImportImage names no image (public), no versions in DescribeImportImageOs (TCE).
    Old,
}

/// What a lab is made of.
pub struct Config {
    /// Which edition is spoken.
    pub edition: Edition,
    /// Which shapes of it.
    pub shapes: Shapes,
    /// The one region.
    pub region: String,
    /// Whose requests pass.
    pub keys: Vec<Credentials>,
    /// The lab's own folder: images and consoles are kept in `cvm` below it, and forgotten at the next start.
    pub folder: PathBuf,
    /// The port on 127.0.0.1; 0 lets the system choose.
    pub port: u16,
    /// Boots images and instances; without one nothing is booted and instances fail to launch.
    pub hypervisor: Option<Arc<dyn Hypervisor>>,
    /// Where external programs are.
    pub programs: Programs,
    /// The server's clock.
    pub clock: Arc<dyn Clock>,
    /// The object store's `host:port`; links elsewhere are no COS links. Anything on this machine when none.
    pub cos: Option<String>,
    /// Take qcow2 with zstd or extended L2, which old importers refuse.
    pub new_qcow2: bool,
    /// Failed images disappear instead of showing IMPORTFAILED.
    pub failed_images_vanish: bool,
}

impl Config {
    /// A public cloud without a hypervisor in `folder`, for requests signed with `keys`.
    pub fn new(folder: impl Into<PathBuf>, keys: Vec<Credentials>) -> Self {
        Config {
            edition: Edition::Public,
            shapes: Shapes::New,
            region: "ap-guangzhou".to_owned(),
            keys,
            folder: folder.into(),
            port: 0,
            hypervisor: None,
            programs: Programs::default(),
            clock: Arc::new(SystemClock::new()),
            cos: None,
            new_qcow2: false,
            failed_images_vanish: false,
        }
    }
}

/// Fresh random keys, good for a lab and nothing else.
pub fn generate_keys() -> Credentials {
    let random = || uuid::Uuid::new_v4().simple().to_string();
    Credentials { secret_id: format!("AKIDlab{}", random()), secret_key: Secret::new(random()), token: None }
}

/// A fault to show once instead of, or after, an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// `RequestLimitExceeded`; nothing is done.
    RateLimit,
    /// `InternalError`; nothing is done.
    InternalError,
    /// HTTP 502; nothing is done.
    BadGateway,
    /// The action is carried out and its answer is cut short.
    LostAnswer,
}

/// The lab's state, shared by requests, imports and instances.
struct Lab {
    config: Config,
    gate: Mutex<Gate>,
    world: Mutex<World>,
    turn: Semaphore,
}

impl Lab {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the files of an image or instance are.
    fn folder(&self, id: &str) -> PathBuf {
        self.config.folder.join("cvm").join(id)
    }

    fn remove_folder(&self, id: &str) {
        if let Err(error) = std::fs::remove_dir_all(self.folder(id)) {
            tracing::warn!(id, %error, "cannot remove the files of an image");
        }
    }

    fn set_instance(&self, id: &str, state: InstanceState) {
        if let Some(instance) = self.world().instances.get_mut(id) {
            instance.state = state;
        }
    }
}

/// A running lab. Dropping it ends the server and takes every instance's power away.
pub struct Handle {
    addr: SocketAddr,
    lab: Arc<Lab>,
    server: tokio::task::JoinHandle<()>,
}

impl Handle {
    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The endpoint to give to a client.
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Shows `faults` one by one at the next requests for `action`.
    pub fn inject(&self, action: &str, faults: impl IntoIterator<Item = Injected>) {
        self.lab.world().injected.entry(action.to_owned()).or_default().extend(faults);
    }

    /// What the account was told, oldest first: `Code` is the cloud's, `LabReason` the lab's own.
    pub fn notifications(&self) -> Vec<Value> {
        self.lab.world().notifications()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.server.abort();
        for instance in self.lab.world().instances.values() {
            instance.stop.store(true, Ordering::SeqCst);
        }
    }
}

/// Starts a lab on 127.0.0.1.
pub fn start(config: Config) -> Result<Handle> {
    judge::find_tools(&config.programs)?;
    let own = config.folder.join("cvm");
    let failed = |error: std::io::Error| {
        Error::new(Kind::Destination, "lab.folder", format!("cannot use {} for the lab", own.display()))
            .caused_by(error)
    };
    forget_earlier(&own).map_err(failed)?;
    let port = config.port;
    let gate = Gate {
        keys: config.keys.clone(),
        edition: config.edition,
        region: config.region.clone(),
        nonces: std::collections::BTreeSet::new(),
    };
    let lab = Arc::new(Lab {
        config,
        gate: Mutex::new(gate),
        world: Mutex::new(World::default()),
        turn: Semaphore::new(1),
    });
    let no_port = |error: std::io::Error| {
        Error::new(Kind::Network, "lab.port", format!("cannot listen on 127.0.0.1:{port}"))
            .caused_by(error)
            .remedy("choose another port")
    };
    let listener = net::block_on(tokio::net::TcpListener::bind(("127.0.0.1", port)))?.map_err(no_port)?;
    let addr = listener.local_addr().map_err(no_port)?;
    let router = Router::new()
        .route("/", any(answer))
        .route("/lab/notifications", get(notifications))
        .route("/lab/instances/{id}/console", get(console))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(lab.clone());
    let server = net::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the lab's server ended");
        }
    })?;
    Ok(Handle { addr, lab, server })
}

/// Makes the folder, without what an earlier lab left in it. Nothing else is ever removed.
fn forget_earlier(own: &std::path::Path) -> std::io::Result<()> {
    std::fs::create_dir_all(own)?;
    for entry in std::fs::read_dir(own)? {
        let entry = entry?;
        let name = entry.file_name();
        if ["img-", "ins-"].iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

async fn answer(
    State(lab): State<Arc<Lab>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let now = lab.config.clock.unix();
    let incoming = Incoming { method: &method, uri: &uri, headers: &headers, body: &body, now };
    let admitted = lab.gate.lock().unwrap_or_else(PoisonError::into_inner).admit(&incoming);
    let mut lost = false;
    let outcome = match admitted {
        Err(fault) => Err(fault),
        Ok(call) => match lab.world().injected.get_mut(&call.action).and_then(VecDeque::pop_front) {
            Some(Injected::BadGateway) => return StatusCode::BAD_GATEWAY.into_response(),
            Some(Injected::RateLimit) => Err(Fault::new("RequestLimitExceeded", "Too many requests.")),
            Some(Injected::InternalError) => Err(Fault::new("InternalError", "An internal error.")),
            Some(Injected::LostAnswer) => {
                lost = true;
                Ok(call)
            }
            None => Ok(call),
        },
    };
    let outcome = outcome.and_then(|call| act(&lab, &call));
    let mut response = outcome.unwrap_or_else(|fault| {
        tracing::info!(code = fault.code, why = fault.message, "refused");
        fault.response()
    });
    response["RequestId"] = uuid::Uuid::new_v4().to_string().into();
    let text = json!({"Response": response}).to_string();
    let body = if lost {
        let half: std::io::Result<Bytes> = Ok(Bytes::from(text[..text.len() / 2].to_owned()));
        let cut = Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        Body::from_stream(futures::stream::iter([half, cut]))
    } else {
        Body::from(text)
    };
    ([(CONTENT_TYPE, "application/json".to_owned()), (DATE, http_date(now))], body).into_response()
}

fn act(lab: &Arc<Lab>, call: &Call) -> std::result::Result<Value, Fault> {
    tracing::info!(action = call.action, "admitted");
    match call.action.as_str() {
        "DescribeImportImageOs" => Ok(images::describe_import_image_os(lab)),
        "ImportImage" => images::import_image(lab, call),
        "DescribeImages" => images::describe_images(lab, call),
        "DescribeImageQuota" => Ok(images::describe_image_quota()),
        "DeleteImages" => images::delete_images(lab, call),
        "ModifyImageAttribute" => images::modify_image_attribute(lab, call),
        "RunInstances" => instances::run_instances(lab, call),
        "DescribeInstances" => instances::describe_instances(lab, call, false),
        "DescribeInstancesStatus" => instances::describe_instances(lab, call, true),
        "StartInstances" => instances::start_instances(lab, call),
        "StopInstances" => instances::stop_instances(lab, call),
        "TerminateInstances" => instances::terminate_instances(lab, call),
        other => Err(Fault::new("InvalidAction", format!("The action `{other}` does not exist."))),
    }
}

async fn notifications(State(lab): State<Arc<Lab>>) -> Json<Value> {
    Json(json!({"Notifications": lab.world().notifications()}))
}

async fn console(State(lab): State<Arc<Lab>>, Path(id): Path<String>) -> Response {
    let path = lab.world().instances.get(&id).map(|instance| instance.console.clone());
    let Some(path) = path else { return StatusCode::NOT_FOUND.into_response() };
    let log = tokio::fs::read(path).await.unwrap_or_default();
    ([(CONTENT_TYPE, "text/plain; charset=utf-8")], log).into_response()
}

fn text<'a>(call: &'a Call, name: &str) -> &'a str {
    call.parameters.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn flag(call: &Call, name: &str) -> bool {
    call.parameters.get(name).and_then(Value::as_bool).unwrap_or_default()
}

fn texts<'a>(call: &'a Call, name: &str) -> Vec<&'a str> {
    let items = call.parameters.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    items.iter().filter_map(Value::as_str).collect()
}

/// The filters of a request, of which only `known` ones are taken.
fn filters(call: &Call, known: &[&str]) -> std::result::Result<Vec<(String, Vec<String>)>, Fault> {
    let given =
        call.parameters.get("Filters").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let values = |filter: &Value| crate::cloud::tencent::wire::strings(&filter["Values"]);
    if given.len() > 10 || given.iter().any(|filter| values(filter).len() > 5) {
        return Err(Fault::new("InvalidFilter", "There may be 10 filters of 5 values."));
    }
    let pairs = given.iter().map(|filter| match filter["Name"].as_str() {
        Some(name) if known.contains(&name) => Ok((name.to_owned(), values(filter))),
        _ => Err(Fault::new("InvalidFilter", format!("The filter {} is not known.", filter["Name"]))),
    });
    pairs.collect()
}

/// One page of a list.
fn page(call: &Call, all: Vec<Value>, list: &str) -> std::result::Result<Value, Fault> {
    let number = |name: &str, default| call.parameters.get(name).and_then(Value::as_u64).unwrap_or(default);
    let (offset, limit) = (number("Offset", 0), number("Limit", 20));
    if !(1..=100).contains(&limit) {
        let why = "Limit goes from 1 to 100.";
        return Err(Fault::new("InvalidParameterValue.InvalidParameterValueLimit", why));
    }
    let total = all.len();
    let entries = all.into_iter().skip(crate::unit::to_usize(offset)).take(crate::unit::to_usize(limit));
    let mut answer = json!({"TotalCount": total});
    answer[list] = entries.collect();
    Ok(answer)
}

/// An id as the cloud makes them: the prefix and eight letters or digits.
fn new_id(prefix: &str) -> String {
    let random = uuid::Uuid::new_v4().simple().to_string();
    format!("{prefix}-{}", &random[..8])
}

fn iso_time(unix: i64) -> String {
    formatted(unix, format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z"))
}

/// The server's time as in the Date header (RFC 9110 §5.6.7).
fn http_date(unix: i64) -> String {
    formatted(
        unix,
        format_description!(
            "[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT"
        ),
    )
}

fn formatted(unix: i64, format: &[time::format_description::BorrowedFormatItem<'_>]) -> String {
    OffsetDateTime::from_unix_timestamp(unix).ok().and_then(|at| at.format(format).ok()).unwrap_or_default()
}
