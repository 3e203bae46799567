"""Serves the app from a Serve config, as `serve deploy` does, on the Ray that this process has joined."""


def deploy(args, port, deployments=()):
    """The app at `port` of this machine; `deployments` as in a Serve config."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    application = {"name": "axn", "import_path": "serve_app.app:build_app", "args": args.model_dump(mode="json")}
    config = ServeDeploySchema(applications=[{**application, "deployments": list(deployments)}])
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    _get_global_client().deploy_apps(config, _blocking=True)
