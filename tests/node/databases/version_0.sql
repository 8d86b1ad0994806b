-- A database as 0.1.0 made it, with one case that waits for delivery to "pacs".
BEGIN TRANSACTION;
CREATE TABLE associations (
	association_id INTEGER NOT NULL,
	calling_ae_title VARCHAR(16) NOT NULL,
	opened_at FLOAT NOT NULL,
	ended_at FLOAT,
	released INTEGER,
	PRIMARY KEY (association_id)
);
INSERT INTO "associations" VALUES(1,'SCANNER',1.7956e+09,1.7956e+09,1);
CREATE TABLE cases (
	case_id INTEGER NOT NULL,
	series_instance_uid VARCHAR(64) NOT NULL,
	study_instance_uid VARCHAR(64) NOT NULL,
	calling_ae_title VARCHAR(16) NOT NULL,
	state VARCHAR(16) NOT NULL,
	reason VARCHAR NOT NULL,
	num_instances INTEGER NOT NULL,
	attempts INTEGER NOT NULL,
	first_received_at FLOAT NOT NULL,
	last_received_at FLOAT NOT NULL,
	next_check_at FLOAT NOT NULL,
	changed_at FLOAT NOT NULL,
	result_dir VARCHAR,
	summary VARCHAR NOT NULL,
	PRIMARY KEY (case_id),
	UNIQUE (series_instance_uid)
);
INSERT INTO "cases" VALUES(1,'1.2.3','1.2','SCANNER','delivering','',1,1,1.7956e+09,1.7956e+09,1.7956e+09,1.7956e+09,'cases/1.2.3/results','fracture absent 0.02');
CREATE TABLE deliveries (
	delivery_id INTEGER NOT NULL,
	case_id INTEGER NOT NULL,
	destination VARCHAR NOT NULL,
	result_dir VARCHAR NOT NULL,
	state VARCHAR(16) NOT NULL,
	attempts INTEGER NOT NULL,
	next_attempt_at FLOAT NOT NULL,
	reason VARCHAR NOT NULL,
	PRIMARY KEY (delivery_id),
	UNIQUE (case_id, destination),
	FOREIGN KEY(case_id) REFERENCES cases (case_id)
);
INSERT INTO "deliveries" VALUES(1,1,'pacs','cases/1.2.3/results','pending',0,1.7956e+09,'');
CREATE TABLE instances (
	sop_instance_uid VARCHAR(64) NOT NULL,
	series_instance_uid VARCHAR(64) NOT NULL,
	association_id INTEGER NOT NULL,
	path VARCHAR NOT NULL,
	headers JSON NOT NULL,
	PRIMARY KEY (sop_instance_uid),
	FOREIGN KEY(series_instance_uid) REFERENCES cases (series_instance_uid) DEFERRABLE INITIALLY DEFERRED,
	FOREIGN KEY(association_id) REFERENCES associations (association_id)
);
INSERT INTO "instances" VALUES('1.2.3.1','1.2.3',1,'instances/1.2.3/1.2.3.1.dcm','[{"sop_instance_uid": "1.2.3.1", "series_instance_uid": "1.2.3", "study_instance_uid": "1.2"}]');
CREATE TABLE results (
	sop_instance_uid VARCHAR(64) NOT NULL,
	case_id INTEGER NOT NULL,
	PRIMARY KEY (sop_instance_uid),
	FOREIGN KEY(case_id) REFERENCES cases (case_id)
);
INSERT INTO "results" VALUES('9.8.7',1);
CREATE INDEX cases_by_state ON cases (state, next_check_at);
CREATE INDEX ix_instances_association_id ON instances (association_id);
CREATE INDEX ix_instances_series_instance_uid ON instances (series_instance_uid);
CREATE INDEX deliveries_due ON deliveries (state, destination, next_attempt_at);
COMMIT;
